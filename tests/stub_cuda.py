"""A CUDA driver that only takes notes, so that Triton's real launch path runs where there is no GPU.

`python stub_cuda.py`, run by `output_of`, compiles kernels for Hopper, launches each through Triton and through
`PreparedLaunch`, and prints what reached the driver as JSON.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SOURCE = r"""
#include <string.h>
#include "cuda.h"
static int sizes[256], n_sizes, launches, encodes;
static unsigned char noted[65536];
static int n_noted;
static void note(const void *data, int size) { memcpy(noted + n_noted, data, size); n_noted += size; }
void stub_expect(int n, const int *s) { n_sizes = n; memcpy(sizes, s, n * sizeof(int)); }
int stub_noted(unsigned char *out) { int n = n_noted; memcpy(out, noted, n); n_noted = 0; return n; }
int stub_launches(void) { return launches; }
int stub_encodes(void) { return encodes; }
CUresult cuGetErrorString(CUresult e, const char **s) { *s = "stub error"; return 0; }
CUresult cuDeviceGet(CUdevice *d, int i) { *d = i; return 0; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) { *v = 232448; return 0; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)1; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)1; return 0; }
CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
CUresult cuCtxGetLimit(size_t *v, CUlimit l) { *v = 0; return 0; }
CUresult cuCtxSetLimit(CUlimit l, size_t v) { return 0; }
CUresult cuDriverGetVersion(int *v) { *v = 13020; return 0; }
CUresult cuModuleLoadData(CUmodule *m, const void *d) { *m = (CUmodule)2; return 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *n) { *f = (CUfunction)3; return 0; }
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) { *v = 1024; return 0; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return 0; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; return 0; }
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)v = p; return 0; }
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
    const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps,
    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
    CUtensorMapFloatOOBfill fill) {
  unsigned char *out = (unsigned char *)map;
  int kind[4] = {type, swizzle, fill, rank};
  encodes++;
  memset(out, 0, sizeof *map);
  memcpy(out, kind, 16);
  memcpy(out + 16, &address, 8);
  memcpy(out + 24, dims, 8 * rank);
  memcpy(out + 64, strides, 8 * (rank - 1));
  memcpy(out + 96, box, 4 * rank);
  return 0;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **extra) {
  unsigned head[10] = {c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                       c->sharedMemBytes, (unsigned)(size_t)c->hStream, (unsigned)(size_t)f, c->numAttrs};
  launches++;
  if (n_noted + 4096 > (int)sizeof noted) n_noted = 0;
  note(head, sizeof head);
  for (int i = 0; i < n_sizes; i++) note(params[i], sizes[i]);
  return 0;
}
"""

BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "fp32": 4, "f32": 4}
STREAM = 77


def build(folder: Path, include: Path) -> None:
    """Compile the stub into `folder`; needs a C compiler, as Triton does."""
    source, library = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text(SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", f"-I{include}", "-o", str(library), str(source)], check=True)


def output_of(script: str, folder: Path, *arguments: str) -> Any:
    """What a script beside this one prints as JSON, run with the stub; `folder` keeps that and Triton's cache."""
    import pytest
    import triton

    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler named cc, for a stand-in of the CUDA driver")
    if not (folder / "libcuda.so.1").exists():
        build(folder, Path(triton.__file__).parent / "backends" / "nvidia" / "include")
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}
    variables |= {"TRITON_CACHE_DIR": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / script), *arguments],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def parameter_sizes(signature: dict[str, str]) -> list[int]:
    """Bytes of each parameter the driver is handed for a compiled kernel, the two scratch addresses included."""
    sizes = []
    for kind in signature.values():
        if kind.startswith("*"):
            sizes.append(8)
        elif kind.startswith("tensordesc"):
            rank = kind.partition("[")[2].partition("]")[0].count(",") + 1
            sizes += [128, *[4] * rank, *[8] * rank]
        elif kind != "constexpr":
            sizes.append(BYTES[kind])
    return [*sizes, 8, 8]


class Stub:
    """The driver's notes."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._buffer = ctypes.create_string_buffer(1 << 16)

    def expect(self, sizes: list[int]) -> None:
        self._library.stub_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    def noted(self) -> str:
        """What launches were handed since the last call, in hex."""
        size = self._library.stub_noted(self._buffer)
        return self._buffer.raw[:size].hex()

    @property
    def launches(self) -> int:
        return self._library.stub_launches()

    @property
    def encodes(self) -> int:
        return self._library.stub_encodes()


def use() -> Stub:
    """Let Triton and the launcher believe in one Hopper GPU behind the stub; tensors stay on the CPU."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    from diffopt_kernels import launcher

    class StubDriver(CudaDriver):
        def __init__(self) -> None:
            self.utils = CudaUtils()
            self.launcher_cls = CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda index: STREAM
            self.get_device_capability = lambda index: (9, 0)

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    driver.set_active(StubDriver())
    launcher._current_device = lambda: 0
    launcher._current_stream = lambda index: STREAM
    return Stub()


def main() -> None:
    import torch
    from launcher_cases import attention_cases, cases

    from diffopt_kernels.launcher import PreparedLaunch

    stub = use()
    device = torch.device("cuda", 0)
    results = {}
    for name, (kernel, grid, arguments, tensors) in (cases() | attention_cases()).items():
        prepared = PreparedLaunch(kernel, grid, arguments, device=device)
        stub.expect([])  # parameters of unknown size are not noted
        compiled = prepared.launch_publicly(*tensors)
        stub.expect(parameter_sizes(compiled.src.signature))
        moved = [x.clone() for x in tensors]
        noted = {}
        for what, launch, x in (
            ("public", prepared.launch_publicly, tensors),
            ("first", prepared, tensors),
            ("direct", prepared, tensors),
            ("again", prepared, tensors),
            ("public moved", prepared.launch_publicly, moved),
            ("moved", prepared, moved),
        ):
            stub.noted()
            encodes = stub.encodes
            launch(*x)
            noted[what] = {"bytes": stub.noted(), "encodes": stub.encodes - encodes}
        results[name] = {"refusal": prepared.refusal, "is_direct": prepared.is_direct, **noted}
    print(json.dumps(results))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
