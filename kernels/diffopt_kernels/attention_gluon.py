"""Attention's Gluon kernels with their arguments filled in; device side: _attention_hopper.py, _attention_short.py."""

import math
from typing import Any

import torch

from diffopt_kernels.attention_prepared import OUT, K, Q, V, head_tiles
from diffopt_kernels.launch import AttentionLaunch
from diffopt_kernels.launcher import PreparedLaunch, Tiles

_LOG2_E = math.log2(math.e)
_ROWS = 64  # queries of one warpgroup


def prepared_gluon_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, launch: AttentionLaunch
) -> PreparedLaunch:
    """A "hopper" or "short" launch for 16-bit tensors laid out like these; call it with (q, k, v, out).

    Args:
        q: [B, N_q, H, D]; k and v [B, N_k, H, D]: every address and stride a multiple of 16 bytes, none broadcast.
        k: see q.
        v: see q.
        scale: of the scores.
        launch: what runs; "short" takes no more keys than its tiles hold.
    """
    batch, n_q, heads, head_dim = q.shape
    n_k = k.shape[1]
    if not launch.takes(n_k):
        raise ValueError(f"k.shape[1] is {n_k}; the launch {launch.label} takes at most {launch.block_n} keys")
    at_launch, working = launch.registers
    arguments = {
        "scale_log2": scale * _LOG2_E,
        "N_q": n_q,
        "N_k": n_k,
        "H": heads,
        "D": head_dim,
        "PART_0": launch.parts[0],
        "PART_1": launch.parts[1],
        "num_warps": 4,  # of the first warpgroup; what comes on top is the kernel's business
        "maxnreg": at_launch,
    }
    if launch.kernel == "hopper":
        from diffopt_kernels._attention_hopper import attention_hopper_kernel as kernel

        rows = {"q": _ROWS, "k": launch.block_n, "v": launch.block_n, "o": _ROWS}
        arguments |= {
            "BLOCK_N": launch.block_n,
            "STAGES": launch.num_stages,
            "GROUPS": launch.block_m // _ROWS,
            "LOADER": launch.has_loader,
            "REGISTERS": working,
            "WHOLE_KEY_TILES": n_k % launch.block_n == 0,
            "TURNS": launch.turns,
            "TAIL": launch.tail,
            "n_heads": batch * heads,
        }
        full, rest = hopper_programs(n_q, batch * heads, launch, _multiprocessors(q.device))
        arguments["full_programs"] = full
        programs = full + rest
    else:
        from diffopt_kernels._attention_short import attention_short_kernel as kernel

        a, b = launch.key_blocks
        rows = {"q": _ROWS, "ka": a, "kb": b or a, "va": a, "vb": b or a, "o": _ROWS}
        arguments |= {"BLOCK_A": a, "BLOCK_B": b, "EVERY_KEY_EXISTS": n_k == a + b, "query_tiles": launch.query_tiles}
        programs = -(-n_q // (_ROWS * launch.query_tiles))
    arguments |= _tiles(
        {"q": (Q, q), "k": (K, k), "v": (V, v), "o": (OUT, torch.empty(q.shape, dtype=q.dtype, device="meta"))},
        rows,
        launch,
    )
    return PreparedLaunch(kernel, (programs * batch * heads,), arguments, device=q.device)


def hopper_programs(n_q: int, n_heads: int, launch: AttentionLaunch, multiprocessors: int) -> tuple[int, int]:
    """Programs of one head: full ones, and those after them that have `launch.tail` tiles of queries each.

    Without a tail the last wave of full programs takes as long as every other, however few they are. With one, full
    programs fill whole waves and what remains is spread over all multiprocessors.
    """
    tiles, groups = -(-n_q // _ROWS), launch.block_m // _ROWS
    if not launch.tail:
        return -(-tiles // groups), 0
    slots = multiprocessors * launch.programs
    waves = tiles * n_heads // (groups * slots)
    full = max(1, min(waves * slots // n_heads, tiles // groups))
    return full, -(-max(0, tiles - full * groups) // launch.tail)


def _multiprocessors(device: torch.device) -> int:
    """Of the GPU; where kernels are only compiled, those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _tiles(
    tensors: dict[str, tuple[int, torch.Tensor]], rows: dict[str, int], launch: AttentionLaunch
) -> dict[str, Tiles]:
    """Descriptors of both parts of each tensor, by argument name; a part without columns is the first one again."""
    tiles = {}
    for name, n in rows.items():
        index, x = tensors[name[0]]
        for part, columns in enumerate(launch.parts):
            columns = columns or launch.parts[0]
            tiles[f"{name}{part}_desc"] = head_tiles(index, x, n, columns, _shared_layout(n, columns, x.dtype))
    return tiles


def _shared_layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    element = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], element)
