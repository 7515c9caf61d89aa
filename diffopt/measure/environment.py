"""Where a measurement was made: the machine, the software and the state of the clocks.

Everything here is cheap and never fails: what can't be read (no GPU, no NVML, no git) is None.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

_PACKAGES = ("diffopt", "torch", "triton", "diffusers", "transformers", "peft", "numpy")
STRICT = {"extra": "forbid", "ser_json_inf_nan": "strings"}
"""Of pydantic, which keeps dataclasses of this package in records."""


@dataclasses.dataclass(frozen=True)
class Clocks:
    """State of a GPU at one moment: clocks in MHz, temperature in °C, power in W, reasons as NVML's bit mask."""

    sm_mhz: int | None
    memory_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    throttle_reasons: int | None
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True)
class Machine:
    """The hardware and its driver. Memory in bytes, power limit in W; GPU fields are None for a CPU run."""

    gpu: str | None
    gpu_memory: int | None
    compute_capability: str | None
    power_limit_w: float | None
    driver: str | None
    cuda: str | None
    cudnn: str | None
    cpu: str
    cores: int
    threads: int
    memory: int
    system: str
    __pydantic_config__ = STRICT

    @property
    def name(self) -> str:
        """What reports call this machine: the GPU's name, or the CPU's with the cores that were used."""
        return self.gpu or f"{self.cpu} ({self.threads} threads)"


@dataclasses.dataclass(frozen=True)
class Software:
    """Package versions (None: not installed), and which source ran: commit, dirty flag, SHA-256 of the package's code.

    The commit is None outside a checkout; the hash names the code there too.
    """

    python: str
    packages: dict[str, str | None]
    commit: str | None
    dirty: bool | None
    source_hash: str
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True)
class Environment:
    """Machine, software and UTC time (ISO 8601) of a measurement."""

    machine: Machine
    software: Software
    time_utc: str
    __pydantic_config__ = STRICT


def environment(device: torch.device | str) -> Environment:
    """Describe the machine that `device` is on and the software that runs."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Environment(_machine(torch.device(device)), _software(), now)


def clocks(device: torch.device | str) -> Clocks | None:
    """Clocks, temperature and power of a CUDA device now; None on a CPU or without NVML."""
    with _nvml(torch.device(device)) as (nvml, gpu):
        if nvml is None:
            return None
        power = _ask(nvml.nvmlDeviceGetPowerUsage, gpu)
        return Clocks(
            sm_mhz=_ask(nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_SM),
            memory_mhz=_ask(nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_MEM),
            temperature_c=_ask(nvml.nvmlDeviceGetTemperature, gpu, nvml.NVML_TEMPERATURE_GPU),
            power_w=None if power is None else power / 1000,
            throttle_reasons=_ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, gpu),
        )


def process_memory(device: torch.device | str) -> int | None:
    """Bytes of GPU memory that the driver books on this process; None where it doesn't say (some containers)."""
    with _nvml(torch.device(device)) as (nvml, gpu):
        if nvml is None:
            return None
        processes = _ask(nvml.nvmlDeviceGetComputeRunningProcesses, gpu) or []
        return next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)


def gpu_processes(device: torch.device | str) -> int | None:
    """How many processes compute on a CUDA device, this one included; None where the driver doesn't say."""
    with _nvml(torch.device(device)) as (nvml, gpu):
        if nvml is None:
            return None
        processes = _ask(nvml.nvmlDeviceGetComputeRunningProcesses, gpu)
        return None if processes is None else len({process.pid for process in processes})


def energy_j(device: torch.device | str) -> float | None:
    """Joules a CUDA device has used since its driver was loaded; None on a CPU and where the driver doesn't count."""
    with _nvml(torch.device(device)) as (nvml, gpu):
        millijoules = None if nvml is None else _ask(nvml.nvmlDeviceGetTotalEnergyConsumption, gpu)
        return None if millijoules is None else millijoules / 1000


def _machine(device: torch.device) -> Machine:
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    cudnn = torch.backends.cudnn.version() if properties else None
    with _nvml(device) as (nvml, gpu):
        limit = None if nvml is None else _ask(nvml.nvmlDeviceGetPowerManagementLimit, gpu)
        driver = None if nvml is None else _ask(nvml.nvmlSystemGetDriverVersion)
    return Machine(
        gpu=properties.name if properties else None,
        gpu_memory=properties.total_memory if properties else None,
        compute_capability=f"{properties.major}.{properties.minor}" if properties else None,
        power_limit_w=None if limit is None else limit / 1000,
        driver=driver,
        cuda=torch.version.cuda if properties else None,
        cudnn=None if cudnn is None else str(cudnn),
        cpu=cpu_name(),
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory=psutil.virtual_memory().total,
        system=platform.platform(terse=True),
    )


@functools.cache
def cpu_name() -> str:
    """As the system calls the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _software() -> Software:
    package = Path(__file__).resolve().parents[1]
    commit, dirty = _commit(package.parent)
    return Software(
        python=platform.python_version(),
        packages={name: installed_version(name) for name in _PACKAGES},
        commit=commit,
        dirty=dirty,
        source_hash=source_hash(),
    )


def installed_version(name: str) -> str | None:
    """A package's version; None where it isn't installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    if name == "diffopt":  # run from a source tree that isn't installed
        return getattr(sys.modules["diffopt"], "__version__", None)
    return None


def _commit(root: Path) -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout whose top level is `root`; an install inside another checkout is none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


@functools.cache
def source_hash() -> str:
    """SHA-256 (hex) of the code that runs: diffopt's and its kernels' Python files."""
    return _source_hash(Path(__file__).resolve().parents[1])


def _source_hash(package: Path) -> str:
    """SHA-256 over the names and contents of diffopt's and diffopt_kernels' Python files."""
    kernels = importlib.util.find_spec("diffopt_kernels")
    roots = [package] + [Path(place) for place in (kernels.submodule_search_locations or [] if kernels else [])]
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{root.name}/{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _nvml(device: torch.device) -> Iterator[tuple[Any, Any]]:
    """NVML and its handle of a CUDA device, or (None, None)."""
    nvml, gpu = None, None
    with contextlib.suppress(Exception):  # NVML is a courtesy: a measurement never fails for want of it
        if device.type == "cuda":
            import pynvml

            pynvml.nvmlInit()
            nvml, gpu = pynvml, _nvml_handle(pynvml, device)
    try:
        yield nvml, gpu
    finally:
        if nvml is not None:
            nvml.nvmlShutdown()


def _nvml_handle(nvml: Any, device: torch.device) -> Any:
    """By UUID: CUDA numbers only the visible devices, NVML all of them."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is not None:
        with contextlib.suppress(nvml.NVMLError):
            return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return nvml.nvmlDeviceGetHandleByIndex(device.index or 0)


def _ask(query: Any, *arguments: Any) -> Any:
    with contextlib.suppress(Exception):  # a question this driver doesn't answer
        answer = query(*arguments)
        return answer.decode() if isinstance(answer, bytes) else answer
    return None
