"""`diffopt doctor`: what is here, what works, and why the rest doesn't."""

import argparse
import os
from collections.abc import Iterator, Mapping

from diffopt.errors import DiffoptError

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DIFFUSERS_OFFLINE", "HF_DATASETS_OFFLINE")
_TRUE = ("1", "true", "yes", "on")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="what works here, and why the rest doesn't",
        description="Machine, versions, models, attention backends. Exit code 1 if the bundled model is broken.",
    )
    parser.add_argument(
        "--device", help="whose backends to list: cpu, cuda or cuda:N (default: the first GPU, or the CPU)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print it; exit code 0, or 1 if the bundled model is broken."""
    from diffopt.commands.quiet import quiet_libraries

    quiet_libraries()
    from diffopt.models import resolve_device

    device = resolve_device(arguments.device)
    models, broken = _models()
    sections = {
        "machine": _machine(str(device)),
        "versions": _versions(),
        "models": models,
        f"attention and blocks on {device}": _backends(str(device)),
        "environment": environment_notes(os.environ),
    }
    for title, rows in sections.items():
        print(title)
        rows = list(rows)
        width = max((len(name) for name, _ in rows), default=0)
        for name, text in rows:
            print(f"  {name:<{width}}  {text}".rstrip())
    return 1 if broken else 0


def _machine(device: str) -> Iterator[tuple[str, str]]:
    import torch

    from diffopt.measure.environment import environment

    machine = environment(device).machine
    if machine.gpu is None:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA: install a CUDA build to use a GPU"
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        yield "GPU", f"none in use; usable here: {seen} (this PyTorch build has {build})"
    else:
        memory = f"{(machine.gpu_memory or 0) / 2**30:.0f} GiB"
        yield "GPU", f"{machine.gpu}, {memory}, compute capability {machine.compute_capability}"
        yield (
            "driver",
            f"{machine.driver or 'not readable (install nvidia-ml-py)'}, CUDA {machine.cuda}, cuDNN {machine.cudnn}",
        )
    yield "CPU", f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads in use"
    yield "memory", f"{machine.memory / 2**30:.1f} GiB"
    yield "system", machine.system


def _versions() -> Iterator[tuple[str, str]]:
    from diffopt.measure.environment import environment

    software = environment("cpu").software
    yield "python", software.python
    for name, version in software.packages.items():
        yield name, version or "not installed"
    if software.commit is not None:
        yield "commit", software.commit[:12] + (" with changes" if software.dirty else "")


def _models() -> tuple[list[tuple[str, str]], bool]:
    """Known models, and whether the bundled one can't be used."""
    from diffopt.models import find_model, known_models, model_hash
    from diffopt.models.digest import SHORT, weight_files
    from diffopt.models.weights import read_header

    rows, broken = [], False
    for name, config in known_models().items():
        text = config.about or config.source
        if config.source.startswith("bundled:"):
            try:
                folder = find_model(name).path
                assert folder is not None
                files = weight_files(folder)
                for file in files:
                    read_header(file)
                size = sum(file.stat().st_size for file in files) / 1e6
                text += f"; ready, {size:.1f} MB, hash {model_hash(folder)[:SHORT]}"
            except (DiffoptError, OSError) as error:
                text, broken = f"BROKEN: {error}", True
        rows.append((name, text))
    return rows, broken


def _backends(device: str) -> Iterator[tuple[str, str]]:
    import torch

    from diffopt.attention.backends import BACKENDS, auto_order, guesses, step_kernel_reasons
    from diffopt.attention.machine import compute_capability, device_name
    from diffopt.attention.tuning import tuning

    place = torch.device(device)
    tried = auto_order(place)
    order = ", then ".join(backend.name for backend in tried)
    if guesses(tried, torch.float32) != tried:
        order += ", in float32 sdpa alone"
    if place.type == "cuda":
        yield "tuned", tuning(device_name(place), compute_capability(place)).words
        order += "; of shapes that are tuned the fastest exact one comes first"
    yield "auto", f"tries {order}"
    for backend in BACKENDS.values():
        reasons = backend.device_reasons(place)
        yield backend.name, "works" if not reasons else f"no: {'; '.join(reasons)}"
    reasons = step_kernel_reasons(place)
    yield "fused blocks", "work" if not reasons else f"no: {'; '.join(reasons)}"


def environment_notes(variables: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Environment variables that surprise people, and what they do here."""
    forced = variables.get("DIFFUSERS_ATTN_BACKEND")
    if forced:
        yield "DIFFUSERS_ATTN_BACKEND", f"is {forced!r}; it has no effect on Stable Diffusion UNets: use --attention"
    else:
        yield "DIFFUSERS_ATTN_BACKEND", "not set (it would have no effect on Stable Diffusion UNets)"
    offline = [name for name in _OFFLINE if variables.get(name, "").lower() in _TRUE]
    yield "model hub", f"offline, because {', '.join(offline)} is set" if offline else "used for hub ids only"
