"""Products with what follows them in one kernel, on Hopper GPUs: 3×3 convolutions, GEGLU; device side: _products.py.

Convolutions of images at twice their size are `upsampled_convolution`s, launched from here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from diffopt_kernels.launcher import Pointer, PreparedLaunch, Recent, Tiles
from diffopt_kernels.registers import registers
from diffopt_kernels.step.support import common_reasons, empty_image, image_reasons, rows_reasons
from diffopt_kernels.support import compute_capability, device_reasons, interpreted

DTYPES = (torch.float16, torch.bfloat16)
_DEPTH, _ROWS, _GROUPS = 64, 64, 2  # channels of a step, pixels of a warpgroup, warpgroups of a program
_SHARED_BYTES = 228 << 10  # of a multiprocessor; each program takes 1 KiB of them for itself, and its barriers
_OTHER_BYTES = (1 << 10) + 512
_MOST_STAGES = 7
_BLOCKS = (512, 1024)  # elements of one program that adds shares up: 4 or 8 of each thread, whole loads of 16 bytes
_MANY = 4 * 132 * 1024  # elements from which the larger ones are enough for a Hopper GPU
_PREPARED = Recent(512)


@dataclass(frozen=True)
class Form:
    """How a convolution's outputs lie to the pixels of its image.

    Attributes:
        neighbours: pixels that an output sees.
        corners: outputs, beside and below each other, that are made for one pixel.
        stride: pixels from one output to the next.
    """

    neighbours: int
    corners: int = 1
    stride: int = 1

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the pixels that outputs are made for."""
        return height // self.stride, width // self.stride


SAME, STRIDED, UPSAMPLED = Form(9), Form(9, stride=2), Form(4, corners=4)


# --- launches -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProductLaunch:
    """How one product is cut into tiles and programs.

    Attributes:
        parts: columns of a tile, powers of two; (128, 32) are 160, of GEGLU (64, 64) are 64 of hidden and of gate.
        programs: that share one multiprocessor.
        shares: parts that the steps of a tile are cut into, added up by a second kernel; 1 for none.
        gated: for GEGLU.
    """

    parts: tuple[int, int]
    programs: int = 1
    shares: int = 1
    gated: bool = False

    @property
    def label(self) -> str:
        """A short name: "128+32", "64+64 p2 gated", "128+32 in 4 shares"."""
        text = "+".join(str(part) for part in self.parts if part)
        text += f" p{self.programs}" if self.programs > 1 else ""
        return text + (f" in {self.shares} shares" if self.shares > 1 else "") + (" gated" if self.gated else "")

    @property
    def columns(self) -> int:
        """Of one tile of the output."""
        return self.parts[0] if self.gated else sum(self.parts)

    @property
    def stages(self) -> int:
        """Depth of the ring: as many as fit in shared memory beside the output's tile."""
        of_step = 2 * _DEPTH * (_ROWS * _GROUPS + sum(self.parts))
        output = 2 * _ROWS * _GROUPS * self.columns if self.shares == 1 else 0
        return min(_MOST_STAGES, (_SHARED_BYTES // self.programs - _OTHER_BYTES - output) // of_step)

    @property
    def registers(self) -> tuple[int, int]:
        """Per thread: at launch, and of a warpgroup once the loader has given up its own."""
        return registers(128 * _GROUPS, self.programs, loader=True)


def geglu_launch(rows: int, channels: int, columns: int, multiprocessors: int) -> ProductLaunch:
    """For an output of rows × columns.

    Two programs on a multiprocessor hide each other's GELU; where there are steps enough to hide it by themselves, one
    program with tiles twice as wide reads less; one with narrow tiles is finer-grained.

    Measured on an H200, a tile costs a tenth more where narrow programs work alone; on an H100, wide tiles take 3 to 6%
    less from 640 channels on, and 2 to 4% more at 320 (reports/step-checks-h200.txt, step-checks-h100.txt).
    """
    tiles = -(-rows // (_ROWS * _GROUPS)) * -(-columns // 64)
    together = 2 * -(-tiles // (2 * multiprocessors))
    alone = -(-tiles // multiprocessors)
    if 1.1 * alone < together:
        return ProductLaunch((64, 64), gated=True)
    if channels >= 640 and columns % 128 == 0:
        return ProductLaunch((128, 128), gated=True)
    return ProductLaunch((64, 64), 2, gated=True)


_TILES = (
    # launch, microseconds of a step, and of a tile beside its steps, on an H200 (reports/step-checks-h200.txt)
    (ProductLaunch((128, 128)), 0.64, 7.0),
    (ProductLaunch((128, 32)), 0.43, 4.5),
    (ProductLaunch((128, 0)), 0.35, 5.0),
    (ProductLaunch((64, 16)), 0.36, 3.0),
    (ProductLaunch((64, 0), 2), 0.55, 4.0),
)
_ADDITION, _ADDITION_PER_MB = 3.0, 0.17  # microseconds of the second kernel
_LEAST_STEPS = 13  # of a share


def convolution_launch(boxes: int, columns: int, steps: int, multiprocessors: int) -> ProductLaunch:
    """The launch that a model of the time favours.

    Args:
        boxes: of 64 pixels each.
        columns: output channels.
        steps: of 64 channels of one neighbour each.
        multiprocessors: of the GPU.

    Raises:
        ValueError: no tile's columns divide those of the output.
    """
    down = -(-boxes // _GROUPS)
    best: tuple[float, ProductLaunch] | None = None
    for launch, of_step, of_tile in _TILES:
        if columns % launch.columns:
            continue
        tiles, slots = down * (columns // launch.columns), multiprocessors * launch.programs
        for shares in _possible_shares(tiles, steps, slots):
            time = -(-tiles * shares // slots) * (-(-steps // shares) * of_step + of_tile)
            if shares > 1:
                time += _ADDITION + _ADDITION_PER_MB * shares * down * _GROUPS * _ROWS * columns * 4e-6
            if best is None or time < best[0]:
                best = time, replace(launch, shares=shares)
    if best is None:
        raise ValueError(f"columns is {columns}; allowed: multiples of 64 or 80")
    return best[1]


def has_tiles(columns: int) -> bool:
    """Whether a tile's columns divide those of an output."""
    return any(columns % launch.columns == 0 for launch, *_ in _TILES) and columns > 0


def _possible_shares(tiles: int, steps: int, slots: int) -> list[int]:
    """Numbers of shares, none of them empty: 1, and what fills the GPU's programs once or twice."""
    most = max(1, steps // _LEAST_STEPS)
    wanted = {1, max(1, min(most, slots // tiles)), max(1, min(most, 2 * slots // tiles))}
    return sorted({-(-steps // -(-steps // n)) for n in wanted})


def favours_convolution(x: torch.Tensor, columns: int, *, residual: bool, stride: int = 1) -> bool:
    """Whether `convolution` is the faster one for x [B, C, H, W], beside cuDNN's and a pass that adds the residual.

    Where nothing is added and tiles fill the GPU three times over, cuDNN is (reports/step-checks-h200.txt).
    """
    batch, _, height, width = x.shape
    return (
        residual
        or boxes_of(batch, height // stride, width // stride) * columns < 3 * _multiprocessors(x.device) * 128 * _GROUPS
    )


def box_of(height: int, width: int) -> tuple[int, int]:
    """High and wide of the boxes of 64 pixels that cover an image with the least waste.

    Square ones come first: they suit most sizes, and each form is a kernel to compile.
    """
    boxes = [(_ROWS // wide, wide) for wide in (8, 16, 32, 64)]
    return min(boxes, key=lambda box: -(-height // box[0]) * -(-width // box[1]))


def boxes_of(batch: int, height: int, width: int) -> int:
    """How many boxes cover a batch of images."""
    high, wide = box_of(height, width)
    return batch * -(-height // high) * -(-width // wide)


# --- ops ------------------------------------------------------------------------------------------------------------


def product_device_reasons(device: torch.device | str) -> list[str]:
    """Why products can't run on a device: they are written for Hopper's matrix instructions, and for Triton 3.6."""
    device = torch.device(device)
    reasons = device_reasons(device)
    if not reasons and (device.type != "cuda" or interpreted()):
        reasons = ["Gluon kernels can't be interpreted"]
    if not reasons and compute_capability(device) != (9, 0):
        reasons = ["its compute capability is not 9.0 (Hopper), which these products are written for"]
    return reasons or _version_reasons()


def _version_reasons() -> list[str]:
    """Why warps with roles of their own can't be compiled: Triton 3.5 assigned them in another way."""
    from triton import __version__ as version

    major, minor = version.split(".")[:2]
    return [] if (int(major), int(minor)) >= (3, 6) else [f"Triton is {version}; allowed: 3.6 or newer"]


@lru_cache(maxsize=64)
def has_products(device: torch.device) -> bool:
    """Whether products can run on a device."""
    return not product_device_reasons(device)


def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    stride: int = 1,
) -> torch.Tensor:
    """3×3 convolution with a border of one zero, bias and residual, summed in float32 and rounded once.

    `torch.nn.functional.conv2d(x, weight, bias, stride, padding=1) + residual`. Traceable as one op, capturable in CUDA
    graphs.

    Args:
        x: [B, C, H, W] in channels-last memory, float16 or bfloat16, C a multiple of 64.
        weight: [N, C, 3, 3] in channels-last memory, dtype and device of x, N a multiple of 64 or 80.
        bias: [N], likewise.
        residual: as the result, likewise, or None.
        stride: 1, or 2 where H and W are even.

    Returns:
        [B, N, H / stride, W / stride] in channels-last memory.

    Raises:
        ValueError: an input this op can't take; the text names tensor, value and what is allowed.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        _refuse(convolution_reasons(x, weight, bias, residual, stride))
    return _CONVOLUTION(x, weight, bias, residual, stride)


def convolution_reasons(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    stride: int = 1,
) -> list[str]:
    """Why `convolution` can't take these inputs on a Hopper GPU: one text per reason, or an empty list."""
    reasons = image_reasons(x) + image_reasons(weight, "weight")
    reasons += [] if residual is None else image_reasons(residual, "residual")
    if reasons:
        return reasons
    batch, channels, height, width = x.shape
    columns = weight.shape[0]
    if tuple(weight.shape[1:]) != (channels, 3, 3):
        reasons.append(f"weight.shape is {list(weight.shape)}; allowed: [N, {channels}, 3, 3]")
    if channels % _DEPTH or not channels:
        reasons.append(f"x.shape[1] is {channels}; allowed: multiples of {_DEPTH} but 0")
    if not has_tiles(columns):
        reasons.append(f"weight.shape[0] is {columns}; allowed: multiples of 64 or 80 but 0")
    if batch * height * width * max(columns, channels) >= 2**31:
        reasons.append(f"x is {list(x.shape)}; allowed: fewer than 2**31 elements, in and out")
    if stride not in (1, 2):
        reasons.append(f"stride is {stride}; allowed: 1, 2")
    elif height % stride or width % stride:
        reasons.append(f"x.shape is {list(x.shape)} with stride 2; allowed: even heights and widths")
    shape = [batch, columns, height // (stride or 1), width // (stride or 1)]
    if residual is not None and list(residual.shape) != shape:
        reasons.append(f"residual.shape is {list(residual.shape)}; allowed: {shape}")
    others = (("bias", bias, (columns,)), ("weight", weight, None), ("residual", residual, None))
    return reasons + common_reasons(x, *others) + product_reasons(x, ("weight", weight), ("bias", bias))


def geglu_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """hidden · gelu(gate) of the halves hidden, gate of x weightᵀ + bias, exact (erf) GELU, rounded once.

    The first layer of a feed-forward: Shazeer, GLU Variants Improve Transformer, 2020. Traceable as one op, capturable
    in CUDA graphs.

    Args:
        x: [..., C] contiguous, float16 or bfloat16, C a multiple of 8.
        weight: [2 D, C] contiguous, dtype and device of x, D a multiple of 64; rows of hidden, then of gate.
        bias: [2 D], likewise.

    Returns:
        [..., D], contiguous.

    Raises:
        ValueError: an input this op can't take; the text names tensor, value and what is allowed.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        _refuse(geglu_product_reasons(x, weight, bias))
    return _GEGLU(x, weight, bias)


def geglu_product_reasons(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> list[str]:
    """Why `geglu_product` can't take these inputs on a Hopper GPU: one text per reason, or an empty list."""
    reasons = rows_reasons(x)
    if not reasons and not x.is_contiguous():
        reasons.append(f"x has strides {x.stride()}; allowed: contiguous")
    if weight.dim() != 2 or not weight.is_contiguous():
        reasons.append(f"weight is {list(weight.shape)} with strides {weight.stride()}; allowed: [2 D, C], contiguous")
    if reasons:
        return reasons
    rows, channels = weight.shape
    if x.shape[-1] != channels or channels % 8 or not channels:
        allowed = "the same multiple of 8 but 0"
        reasons.append(f"x.shape[-1] is {x.shape[-1]} and weight.shape[1] {channels}; allowed: {allowed}")
    if rows % (2 * 64) or not rows:
        reasons.append(f"weight.shape[0] is {rows}; allowed: multiples of 128 but 0")
    if x.numel() // max(1, channels) * rows >= 2**31:
        reasons.append(f"x is {list(x.shape)}; allowed: fewer than 2**31 elements in the product")
    others = (("bias", bias, (rows,)), ("weight", weight, None))
    return reasons + common_reasons(x, *others) + product_reasons(x, ("weight", weight), ("bias", bias))


def product_reasons(x: torch.Tensor, *others: tuple[str, torch.Tensor]) -> list[str]:
    """Why x and the named others don't suit descriptors and 16-bit matrix instructions; an empty list if they do."""
    reasons = []
    if x.dtype not in DTYPES:
        reasons.append(f"x.dtype is {x.dtype}; allowed: {', '.join(str(dtype) for dtype in DTYPES)}")
    if type(x) is torch.Tensor and not torch.compiler.is_compiling() and x.device.type == "cuda":
        for name, other in (("x", x), *others):
            if other.data_ptr() % 16:
                reasons.append(f"{name} begins at an address that is no multiple of 16 bytes; allowed: those that are")
    return reasons


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise ValueError("; ".join(reasons))


def _fake_convolution(x, weight, bias, residual=None, stride=1):
    with torch.no_grad():
        _refuse(convolution_reasons(x, weight, bias, residual, stride))
    return empty_image(x, weight.shape[0], 1 / stride)


def _fake_geglu(x, weight, bias):
    with torch.no_grad():
        _refuse(geglu_product_reasons(x, weight, bias))
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


def _run_convolution(x, weight, bias, residual=None, stride=1):
    key = (look(x), look(weight), look(bias), None if residual is None else look(residual), stride)
    prepared = _PREPARED.get(key)
    if prepared is None:
        with torch.no_grad():
            _refuse(product_device_reasons(x.device) or convolution_reasons(x, weight, bias, residual, stride))
        form = SAME if stride == 1 else STRIDED
        prepared = whole_convolution(x, weight.shape[0], residual=residual is not None, form=form)
        _PREPARED.put(key, prepared)
    out = empty_image(x, weight.shape[0], 1 / stride)
    prepared(x, weight, bias, out, out if residual is None else residual)
    return out


def _run_geglu(x, weight, bias):
    key = (look(x), look(weight), look(bias))
    prepared = _PREPARED.get(key)
    if prepared is None:
        with torch.no_grad():
            _refuse(product_device_reasons(x.device) or geglu_product_reasons(x, weight, bias))
        prepared = _prepared_geglu(x, weight)
        _PREPARED.put(key, prepared)
    out = x.new_empty((*x.shape[:-1], weight.shape[0] // 2))
    prepared(x, weight, bias, out)
    return out


def look(x: torch.Tensor):
    """What a launch depends on; descriptors want addresses in multiples of 16 bytes."""
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16


# --- prepared launches ----------------------------------------------------------------------------------------------


def whole_convolution(
    x: torch.Tensor, columns: int, *, residual: bool = False, form: Form = SAME
) -> Callable[..., None]:
    """All that a convolution of tensors like x launches; called with x, weight, bias, out and residual (or anything).

    Args: as `prepared_convolution`.
    """
    if x.numel() == 0:
        return lambda *_: None
    batch, channels, height, width = x.shape
    grid = form.grid(height, width)
    boxes, steps = boxes_of(batch, *grid) * form.corners, form.neighbours * channels // _DEPTH
    launch = convolution_launch(boxes, columns, steps, _multiprocessors(x.device))
    image = (batch, height, width, channels)
    product = prepared_convolution(image, columns, launch, x.dtype, x.device, residual=residual, form=form)
    if launch.shares == 1:
        return lambda x, weight, bias, out, residual: product(x, weight, bias, out, residual, out)
    count = batch * grid[0] * grid[1] * form.corners
    addition = prepared_addition(count, columns, launch.shares, residual, x.device)

    def run(x, weight, bias, out, residual) -> None:
        sums = torch.empty((launch.shares, count, columns), dtype=torch.float32, device=x.device)
        product(x, weight, bias, out, residual, sums)
        addition(sums, bias, out, residual)

    return run


def _prepared_geglu(x, weight) -> Callable[..., None]:
    """Called with x, weight, bias and out."""
    if x.numel() == 0:
        return lambda *_: None
    channels, columns = x.shape[-1], weight.shape[0] // 2
    rows = x.numel() // channels
    launch = geglu_launch(rows, channels, columns, _multiprocessors(x.device))
    return prepared_geglu_product(rows, channels, columns, launch, x.dtype, x.device)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def prepared_convolution(
    image: tuple[int, int, int, int],
    columns: int,
    launch: ProductLaunch,
    dtype: torch.dtype,
    device: torch.device,
    *,
    residual: bool = False,
    form: Form = SAME,
) -> PreparedLaunch:
    """The convolution of contiguous [B, H, W, C]; called with x, weight, bias, out, residual and sums.

    Args:
        image: B, H, W, C.
        columns: N of the output [B, H, W, N], a multiple of the launch's.
        launch: what runs; with shares it leaves their sums instead of an output.
        dtype: float16 or bfloat16.
        device: on "meta" the launch is as on an H100, for compiling only.
        residual: whether one is added; not to an upsampled one.
        form: UPSAMPLED is of the image at twice its size, with weight [4, N, 4, C] and out [B, 2 H, 2 W, N]; STRIDED
            wants H and W even, and out is [B, H / 2, W / 2, N].
    """
    from diffopt_kernels.step._products import convolution_kernel, upsampled_convolution_kernel

    batch, height, width, channels = image
    height, width = form.grid(height, width)
    high, wide = box_of(height, width)
    boxes = boxes_of(batch, height, width)
    split = launch.shares > 1
    arguments = _common(launch, channels, columns)
    arguments |= {"B": batch, "H": height, "W": width, "n_shares": launch.shares}
    arguments |= {"PART_1": launch.parts[1], "HIGH": high, "WIDE": wide, "SPLIT": split}
    arguments["sums_ptr"] = Pointer(5)
    if form == UPSAMPLED:
        kernel = upsampled_convolution_kernel
    else:
        kernel = convolution_kernel
        arguments |= {"residual_ptr": Pointer(4), "has_residual": int(residual and not split), "STRIDE": form.stride}
    # Where one side has more pixels than the grid, its blocks of 2×2 are dimensions of their own.
    blocks, box = (batch, height, 2, width), (1, high, 1, wide)
    pixels, its_box = (batch, height, width), (1, high, wide)
    x, x_box = (pixels, its_box) if form.stride == 1 else (blocks, box)
    out, out_box = (pixels, its_box) if form.corners == 1 else (blocks, box)
    arguments["x_desc"] = _tiles(0, (*x, form.stride * channels), (*x_box, _DEPTH), dtype)
    rows, depth = form.corners * columns, form.neighbours * channels
    for part, width_of_part in enumerate(launch.parts):
        n = width_of_part or 16
        arguments[f"w{part}_desc"] = _tiles(1, (rows, depth), (n, _DEPTH), dtype)
        arguments[f"out{part}_desc"] = _tiles(3, (*out, columns * (2 if form.corners > 1 else 1)), (*out_box, n), dtype)
    tiles = -(-boxes // _GROUPS) * (rows // launch.columns) * launch.shares
    return PreparedLaunch(kernel, (_programs(tiles, launch, device),), arguments, device=device)


def prepared_geglu_product(
    rows: int, channels: int, columns: int, launch: ProductLaunch, dtype: torch.dtype, device: torch.device
) -> PreparedLaunch:
    """GEGLU of the product of contiguous [rows, channels]; called with x, weight, bias and out [rows, columns].

    Args: as `prepared_convolution`; launch: a gated one.
    """
    from diffopt_kernels.step._products import geglu_product_kernel

    arguments = _common(launch, channels, columns)
    arguments["M"] = rows
    arguments["x_desc"] = _tiles(0, (1, 1, rows, channels), (1, 1, _ROWS, _DEPTH), dtype)
    arguments["out0_desc"] = _tiles(3, (1, 1, rows, columns), (1, 1, _ROWS, launch.columns), dtype)
    for part in ("w0_desc", "w1_desc"):
        arguments[part] = _tiles(1, (2 * columns, channels), (launch.columns, _DEPTH), dtype)
    tiles = -(-rows // (_ROWS * _GROUPS)) * (columns // launch.columns)
    return PreparedLaunch(geglu_product_kernel, (_programs(tiles, launch, device),), arguments, device=device)


def _common(launch: ProductLaunch, channels: int, columns: int) -> dict[str, Any]:
    """Arguments of both kernels."""
    at_launch, working = launch.registers
    return {
        "bias_ptr": Pointer(2),
        "C": channels,
        "N": columns,
        "PART_0": launch.parts[0],
        "STAGES": launch.stages,
        "GROUPS": _GROUPS,
        "REGISTERS": working,
        "num_warps": 4,  # of the first warpgroup; what comes on top is the kernel's business
        "maxnreg": at_launch,
    }


def _programs(tiles: int, launch: ProductLaunch, device: torch.device) -> int:
    """Programs stay, so there are no more than run at once."""
    multiprocessors = _multiprocessors(device) if device.type == "cuda" else 132
    return min(tiles, multiprocessors * launch.programs)


def _tiles(tensor: int, shape: tuple[int, ...], block: tuple[int, ...], dtype: torch.dtype) -> Tiles:
    """A contiguous tensor in blocks."""
    from triton.experimental.gluon import language as gl

    element = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype]
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    layout = gl.NVMMASharedLayout.get_default_for(list(block), element)
    return Tiles(tensor, shape, tuple(reversed(strides)), block, layout)


def prepared_addition(count: int, columns: int, shares: int, residual: bool, device: torch.device) -> PreparedLaunch:
    """What adds up `shares` of sums [shares, count, columns]; called with sums, bias, out and residual."""
    from diffopt_kernels.step._products import convolution_sums_kernel

    total = count * columns
    wide = 64 if columns % 64 == 0 else 16
    rows = _BLOCKS[total >= _MANY] // wide
    arguments = {
        "sums_ptr": Pointer(0),
        "bias_ptr": Pointer(1),
        "residual_ptr": Pointer(3) if residual else None,
        "out_ptr": Pointer(2),
        "count": count,
        "N": columns,
        "n_shares": shares,
        "SHARES": 1 << (shares - 1).bit_length(),
        "ROWS": rows,
        "COLS": wide,
        "WIDE": (shares + 1) * total + rows * columns >= 2**31,
        "num_warps": 4,
        "maxnreg": 128,  # with none, ptxas aims at more programs than there are and lets loads wait for each other
    }
    grid = (columns // wide * -(-count // rows),)
    return PreparedLaunch(convolution_sums_kernel, grid, arguments, device=device)


_LIBRARY = torch.library.Library("diffopt_kernels", "FRAGMENT")
_LIBRARY.define("convolution(Tensor x, Tensor weight, Tensor bias, Tensor? residual=None, int stride=1) -> Tensor")
_LIBRARY.define("geglu_product(Tensor x, Tensor weight, Tensor bias) -> Tensor")
for _name, _run, _fake in (
    ("convolution", _run_convolution, _fake_convolution),
    ("geglu_product", _run_geglu, _fake_geglu),
):
    _LIBRARY.impl(_name, _run, "CUDA")
    _LIBRARY.impl(_name, _run, "CPU")  # refuses in words
    torch.library.register_fake(f"diffopt_kernels::{_name}", _fake, lib=_LIBRARY)
_CONVOLUTION = torch.ops.diffopt_kernels.convolution.default
_GEGLU = torch.ops.diffopt_kernels.geglu_product.default
