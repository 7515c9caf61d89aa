"""What was tuned and measured for a GPU: launches for the kernels, and the ranking of backends that `auto` follows.

Two files may serve a GPU: the one shipped in configs/gpus and the user's own, written by `diffopt tune` into the cache
folder. Both are read; where both have a shape, the newer file counts. A file that does not fit is refused in one line
and left as it is. Where no shipped one fits, that of another GPU with the same compute capability serves shapes that
the user's has not. Without any the kernels' heuristics choose the launches, and `auto` takes diffopt's kernel wherever
it can serve, in float32 PyTorch's SDPA.

A file fits a GPU of its name, and each of its rows the Triton that was measured with: the file's own unless the row
names another, so that one file holds the choices for several. The user's must also be about these very kernels, since
nobody else has checked its launches; the launches of a shipped one are checked with each release. Another PyTorch is no
reason to refuse: launches do not depend on it, and an older ranking is better than none.
"""

import dataclasses
import functools
import logging
from pathlib import Path

import platformdirs
import torch

import diffopt_kernels.launch as launches
from diffopt.attention.machine import compute_capability, device_name, machine
from diffopt.config import ConfigError, config_folder
from diffopt.gpus import Gpu, TunedAttention, TunedShape, read_gpu, shipped_file, shipped_kin, slug
from diffopt_kernels.candidates import attention_candidates
from diffopt_kernels.launch import AttentionLaunch, LaunchKey

logger = logging.getLogger(__name__)

REACH = 2.0
"""How far a ranking carries to shapes that were not tuned: sizes that differ by 2 ** 2 altogether."""

HINT = "run: diffopt tune"
AGAIN = f"{HINT} --again"


@dataclasses.dataclass(frozen=True)
class TunedRow:
    """One tuned shape and where it is written."""

    shape: TunedShape
    source: str
    date: str

    @property
    def evidence(self) -> str:
        """The times by which backends were ranked: "diffopt 98.1 µs, sdpa-cudnn 151.6 (file, date)"."""
        times = [f"{name} {self.shape.microseconds[name]:.1f}" for name in self.shape.ranking]
        return f"{times[0]} µs{''.join(f', {time}' for time in times[1:])} ({self.source}, {self.date[:10]})"


@dataclasses.dataclass(frozen=True)
class Tuning:
    """All that is known for one GPU.

    Attributes:
        rows: tuned shapes by their sizes and dtype.
        sources: each file in use and the date of its last row for this Triton, the newest file last.
        refused: one line for each file that is not used.
        borrowed: whether some of what is in use was measured on another GPU.
    """

    rows: dict[tuple[LaunchKey, str], TunedRow] = dataclasses.field(default_factory=dict)
    sources: tuple[tuple[str, str], ...] = ()
    refused: tuple[str, ...] = ()
    borrowed: bool = False

    @property
    def launches(self) -> dict[LaunchKey, AttentionLaunch]:
        """What the kernels' lookup takes; they share launches among 16-bit dtypes, float16's come first."""
        order = ("float16", "bfloat16")
        found: dict[LaunchKey, AttentionLaunch] = {}
        for dtype in order:
            for (key, other), row in self.rows.items():
                if other == dtype and row.shape.launch is not None:
                    found.setdefault(key, row.shape.launch)
        return found

    def nearest(self, key: LaunchKey, dtype: str) -> TunedRow | None:
        """The row of this shape, or of the nearest one within `REACH` with its head dim, key class and kind of dtype.

        A 16-bit dtype falls back on the other one's rows; float32 has none to fall back on. Rows whose launch can't
        take so many keys are passed over, as the kernels do; nothing is near a call with a size of 0.
        """
        if min(dataclasses.astuple(key)) < 1:
            return None
        for kind in dict.fromkeys((dtype, *(("float16", "bfloat16") if dtype != "float32" else ()))):
            if (key, kind) in self.rows:
                return self.rows[key, kind]
            near = [
                row
                for (other, its), row in self.rows.items()
                if its == kind
                and (other.head_dim, other.keys) == (key.head_dim, key.keys)
                and (row.shape.launch is None or row.shape.launch.takes(key.n_k))
            ]
            found = min(near, key=lambda row: launches.distance(key, row.shape.key), default=None)
            if found is not None and launches.distance(key, found.shape.key) <= REACH:
                return found
        return None

    @property
    def words(self) -> str:
        """One line for people: from which files and dates this GPU is tuned, or that it is not."""
        used = [f"{self._count(name)} from {name}, {date[:10]}" for name, date in self.sources]
        text = "; ".join(used) or f"no: launches are guessed and auto is not measured ({HINT})"
        borrowed = (f"what was measured on another GPU may not be the fastest here ({HINT})",) if self.borrowed else ()
        return "; ".join((text, *borrowed, *self.refused))

    def _count(self, source: str) -> str:
        number = sum(row.source == source for row in self.rows.values())
        return f"{number} shape{'' if number == 1 else 's'}"


def user_file(name: str) -> Path:
    """Where `diffopt tune` keeps its results for the GPU the driver calls `name`."""
    return platformdirs.user_cache_path("diffopt") / "gpus" / f"{slug(name)}.toml"


@functools.cache
def tuning(name: str, compute_capability: str = "") -> Tuning:
    """What is tuned for the GPU the driver calls `name`; read once, refused files are logged.

    Args:
        compute_capability: as "9.0"; if empty, no other GPU's table serves.
    """
    shipped, own = shipped_file(name), user_file(name)
    here = machine_versions()
    tables: list[tuple[TunedAttention, str]] = []
    refused = []
    for path in (shipped, own):
        if path is None or not path.exists():
            continue
        try:
            gpu = read_gpu(path)
        except ConfigError as error:
            refused.append(f"{short_path(path)} is not used: {error}; {AGAIN}")
            continue
        reason = misfit(gpu, {**here, "device": name}, shipped=path == shipped)
        if reason:
            own_hint = AGAIN if gpu.name == name else f"move it away, then {HINT}"
            refused.append(f"{short_path(path)} is not used: {reason}; {HINT if path == shipped else own_hint}")
        elif gpu.attention is not None:
            tables.append((gpu.attention, short_path(path)))
    for line in refused:
        logger.warning("tuned launches: %s", line)
    fits = shipped is not None and short_path(shipped) in {source for _, source in tables}
    borrowed = [] if fits else _borrowed(name, compute_capability, here)
    tables = [*borrowed, *sorted(tables, key=lambda table: table[0].date)]
    rows = {
        (shape.key, shape.dtype): TunedRow(shape, source, shape.date or table.date)
        for table, source in tables
        for shape in table.shapes_with(here["triton"])
    }
    used = {row.source for row in rows.values()}
    sources = tuple((source, _date(table, here["triton"])) for table, source in tables if source in used)
    return Tuning(rows, sources, tuple(refused), borrowed=any(source in used for _, source in borrowed))


def _date(table: TunedAttention, triton: str | None) -> str:
    """When the last of its rows for a Triton was measured."""
    return max((shape.date or table.date for shape in table.shapes_with(triton)), default=table.date)


def _borrowed(name: str, compute_capability: str, here: dict[str, str | None]) -> list[tuple[TunedAttention, str]]:
    """The table with most rows that GPUs of a kind have for this Triton, and where it is from; empty if none has."""
    fitting = [
        (gpu.attention, f"{short_path(path)}, measured on {gpu.name}")
        for path, gpu in shipped_kin(name, compute_capability)
        if gpu.attention and not misfit(gpu, {**here, "device": gpu.name}, shipped=True)
    ]
    return sorted(fitting, key=lambda table: -len(table[0].shapes_with(here["triton"])))[:1]


def machine_versions() -> dict[str, str | None]:
    """Versions on which a table depends, whatever the device."""
    return {key: value for key, value in machine(torch.device("cpu")).items() if key != "device"}


def misfit(gpu: Gpu, here: dict[str, str | None], *, shipped: bool) -> str:
    """Why a GPU's file can't serve on a machine (see `machine`); empty if it can, or holds no attention table."""
    if gpu.name != here["device"]:
        return f"it is for {gpu.name}, this is {here['device']}"
    table = gpu.attention
    if table is None:
        return ""
    if here["triton"] not in table.tritons:
        return f"tuned with Triton {' and '.join(table.tritons)}, here it is {here['triton']}"
    if not shipped and table.kernels != here["kernels"]:
        return f"tuned for other kernels ({table.kernels}, here {here['kernels']})"
    return next(filter(None, map(unknown_launch, table.shapes)), "")


def unknown_launch(shape: TunedShape) -> str:
    """Why a row can't serve with these kernels: its launch is none of theirs; empty if it can."""
    if shape.launch is None or shape.launch in launches_to_try(shape.key, shape.dtype):
        return ""
    return f"{shape.case}: launch {shape.launch.label!r} is none that these kernels have"


def launches_to_try(key: LaunchKey, dtype: str) -> list[AttentionLaunch]:
    """Launches that may serve a shape: what the heuristics would take first, then all candidates of its head dim.

    float32 has no choice: the kernels take tuned launches for 16-bit tensors only.
    """
    if key.head_dim not in launches.HEAD_DIMS:
        return []
    float32 = dtype == "float32"
    guesses = [
        launches.attention_launch(key, float32=float32, aligned=aligned, capability=capability)
        for capability in ((9, 0), (8, 0))
        for aligned in (True, False)
    ]
    candidates = [] if float32 else [launch for launch in attention_candidates([key.head_dim]) if not launch.float32]
    blocks = [launch.block_n for launch in candidates if launch.kernel == "short" and launch.takes(key.n_k)]
    fitting = (x for x in candidates if x.kernel != "short" or (x.takes(key.n_k) and x.block_n == min(blocks)))
    return list(dict.fromkeys([*guesses, *fitting]))


def short_path(path: Path) -> str:
    """A file as people know it: shipped ones by their place in the project, others in full, the home folder as ~."""
    if path.parent.parent == config_folder():
        return f"configs/{path.parent.name}/{path.name}"
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


@functools.cache
def use_tuned(device: torch.device) -> Tuning:
    """Hand this device's tuned launches to the kernels, once; and what else is tuned for it."""
    found = tuning(device_name(device), compute_capability(device))
    launches.use_tuned_launches(device_name(device), found.launches)
    return found
