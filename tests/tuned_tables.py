"""Tuned tables for tests: a GPU nobody has, and its rows."""

import dataclasses
from pathlib import Path

from diffopt.attention.tuning import launches_to_try, machine_versions
from diffopt.attention.tuning_file import TuningFile
from diffopt.gpus import TunedAttention, TunedShape
from diffopt_kernels.launch import AttentionLaunch, LaunchKey

GPU = "NVIDIA Abacus"
KEY = LaunchKey(2, 4096, 4096, 8, 40)


def header(**changes: object) -> TunedAttention:
    """What a table says of itself, as made here today with these kernels."""
    here = machine_versions()
    made = TunedAttention(
        date="2026-11-23T10:00:00+00:00",
        commit="abc",
        torch=str(here["torch"]),
        triton=str(here["triton"]),
        cudnn="92000",
        driver="580",
        kernels=str(here["kernels"]),
        fp16_tflops=700.0,
        copy_tb_s=4.0,
    )
    return dataclasses.replace(made, **changes)


def launch_for(key: LaunchKey = KEY, index: int = 0, dtype: str = "float16") -> AttentionLaunch:
    """One of the launches that exist for a shape."""
    return launches_to_try(key, dtype)[index]


def row(key: LaunchKey = KEY, *, case: str = "a shape", dtype: str = "float16", **microseconds: float) -> TunedShape:
    """A tuned shape; names of backends have `_` for `-`."""
    times = {name.replace("_", "-"): value for name, value in microseconds.items()}
    launch = launch_for(key, dtype=dtype) if "diffopt" in times else None
    return TunedShape(
        case, key.batch, key.n_q, key.n_k, key.heads, key.head_dim, dtype, times, launch  # type: ignore[arg-type]
    )  # fmt: skip


def write_table(path: Path, *rows: TunedShape, gpu: str = GPU, **changes: object) -> Path:
    """A GPU's file as `diffopt tune` writes it, its header changed as asked (its date too); rows have no dates."""
    file = TuningFile.open(path, gpu, header(), again=True)
    for shape in rows:
        file.keep(shape)
    head, *written = path.read_text().partition("[[attention.shapes]]")
    text = head + "".join(line for line in "".join(written).splitlines(True) if not line.startswith("date = "))
    for key, value in {"date": header().date, **changes}.items():
        old = getattr(file.table, key)
        assert f'{key} = "{old}"' in text
        text = text.replace(f'{key} = "{old}"', f'{key} = "{value}"', 1)
    path.write_text(text)
    return path
