"""`diffopt generate "a red apple"`: make pictures and say how fast."""

import argparse
import contextlib
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from diffopt.commands.start import INTERRUPTED, importing
from diffopt.errors import InputError

if TYPE_CHECKING:
    from diffopt.engine.metadata import PictureMetadata
    from diffopt.engine.requests import GenerationRequest
    from diffopt.engine.worker import Engine, Progress
    from diffopt.models import ModelConfig

DTYPES = ("float16", "bfloat16", "float32")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `generate`."""
    parser = commands.add_parser(
        "generate",
        help="make pictures",
        description="Make pictures one after another; picture i has seed + i and can be made again alone with it.",
    )
    add = parser.add_argument
    add("prompt", nargs="?", help="what the picture shows; only with --from it may be left out")
    add("-m", "--model", help="emoji (bundled), a folder, a .safetensors file, or a hub id (default: emoji)")
    add("--negative", metavar="TEXT", help="what the picture doesn't show")
    add("--steps", help="denoising steps (default: the model's)")
    add("--guidance", metavar="SCALE", help="guidance scale; 1 is none (default: the model's)")
    add("--seed", help="of the first picture (default: random, and printed)")
    add("-n", "--count", help="pictures (default: 1)")
    add("--size", metavar="WxH", help="in pixels (default: the model's)")
    add("--scheduler", metavar="NAME", help="such as euler or dpmpp-2m (default: the model's own)")
    add("-o", "--output", default="out", metavar="FOLDER", help="default: %(default)s")
    add("--attention", metavar="BACKEND", help="auto, or a backend that `diffopt doctor` lists (default: auto)")
    add("--device", help="cpu, cuda or cuda:N (default: the first GPU, or the CPU without one)")
    add("--dtype", metavar="NAME", help=f"{', '.join(DTYPES)} (default: float16 on a GPU, float32 on a CPU)")
    add("--config", metavar="FOLDER", help="configuration of a single file, in diffusers' layout")
    add("--allow-pickle", action="store_true", help="read pickled weights, which can run any code")
    add("--allow-custom-code", action="store_true", help="run pipeline code that comes with the model")
    add(
        "--from",
        dest="picture",
        metavar="PICTURE",
        help="make a picture of diffopt's again; other options given beside it override what it says",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Make the pictures; exit code 0, or 130 when interrupted."""
    from diffopt.commands.quiet import quiet_libraries
    from diffopt.engine.png import check_folder, read_metadata
    from diffopt.engine.requests import GenerationRequest
    from diffopt.models import find_model, model_config_for

    quiet_libraries()
    recorded = read_metadata(arguments.picture) if arguments.picture is not None else None
    _check_options(arguments, recorded)
    model = arguments.model or (recorded.model if recorded else "emoji")
    source = find_model(model)
    config = model_config_for(model, config=arguments.config)
    request = GenerationRequest.create(config, **_fields(arguments, recorded))
    folder = check_folder(arguments.output)
    if source.path is not None:
        threading.Thread(target=_hash_early, args=(source.path,), daemon=True).start()
    with importing():
        engine = _engine(arguments, recorded, model, config)
    notes = engine.notes(request)
    if recorded is not None:
        notes += _differences(recorded, engine, str(arguments.picture))
    for note in notes:
        print(f"diffopt: note: {note}", file=sys.stderr)
    return _make_pictures(engine, request, folder)


def _check_options(arguments: argparse.Namespace, recorded: "PictureMetadata | None") -> None:
    """What can be refused before anything heavy is imported.

    Raises:
        InputError: no prompt, an unknown dtype or device, or a picture of a local model without --model.
    """
    from diffopt.models import known_models

    if recorded is None and arguments.prompt is None:
        raise InputError("prompt", None, 'text is needed, such as diffopt generate "a red apple"; or --from PICTURE')
    if arguments.dtype is not None and arguments.dtype not in DTYPES:
        raise InputError("dtype", arguments.dtype, f"known: {', '.join(DTYPES)}")
    if arguments.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", arguments.device):
        raise InputError("device", arguments.device, "allowed: cpu, cuda, cuda:N")
    local = recorded is not None and "/" not in recorded.model and recorded.model not in known_models()
    if recorded is not None and local and arguments.model is None:
        raise InputError("model", recorded.model, "the picture was made with a local model; give it with --model")


def _fields(arguments: argparse.Namespace, recorded: "PictureMetadata | None") -> dict[str, Any]:
    """The request's fields: what was given as an option, else what the picture of --from says."""
    given = {name: getattr(arguments, name) for name in ("prompt", "steps", "guidance", "seed", "count", "scheduler")}
    given["negative_prompt"] = arguments.negative
    if arguments.size is not None:
        size = re.fullmatch(r"(\d+)[x×](\d+)", arguments.size)
        if size is None:
            raise InputError("size", arguments.size, "two numbers are needed, such as 512x512")
        given["width"], given["height"] = size.groups()
    fields = {name: value for name, value in given.items() if value is not None}
    if recorded is not None:
        names = ("prompt", "negative_prompt", "seed", "steps", "guidance", "scheduler", "width", "height")
        fields = {name: getattr(recorded, name) for name in names} | fields
    return fields


def _hash_early(path: Path) -> None:
    """Hash the weights while the main thread imports; this also brings them into the page cache."""
    from diffopt.models import model_hash

    with contextlib.suppress(Exception):  # whatever is wrong with the files, loading them says it better
        model_hash(path)


def _engine(
    arguments: argparse.Namespace, recorded: "PictureMetadata | None", model: str, config: "ModelConfig"
) -> "Engine":
    """Import, check the device and the backend, load, optimize."""
    import torch

    from diffopt.commands.quiet import quiet_progress_bars
    from diffopt.models import resolve_device

    wanted = arguments.device
    if wanted is None and recorded is not None and (recorded.device.kind == "cpu" or torch.cuda.is_available()):
        wanted = recorded.device.kind
    device = resolve_device(wanted)
    attention = arguments.attention or (recorded.attention.requested if recorded else "auto")
    if attention not in ("auto", "stock"):
        from diffopt.attention.backends import forced

        forced(attention, device)
    dtype = arguments.dtype
    if dtype is None and recorded is not None and recorded.device.kind == device.type:
        dtype = recorded.dtype
        if dtype not in DTYPES:
            raise InputError("dtype", dtype, f"the picture says so; give another with --dtype: {', '.join(DTYPES)}")
    from diffopt.engine.worker import Engine
    from diffopt.handle import optimize
    from diffopt.models import load

    quiet_progress_bars()
    pipe = load(
        model,
        device=device,
        dtype=None if dtype is None else getattr(torch, dtype),
        config=arguments.config,
        allow_pickle=arguments.allow_pickle,
        allow_custom_code=arguments.allow_custom_code,
    )
    return Engine(pipe, config, None if attention == "stock" else optimize(pipe, attention=attention))


def _differences(recorded: "PictureMetadata", engine: "Engine", picture: str) -> list[str]:
    """What is not as it was when a picture was made: at most one line."""
    from diffopt.engine.worker import device_used, versions

    found = []
    if engine.model_hash != recorded.model_hash:
        found.append("the model's weights are others")
    device = device_used(engine.device)
    if device != recorded.device:
        found.append(f"made on {_words(recorded.device)}, here {_words(device)}")
    here = versions()
    found += [
        f"{name} {version}, here {here.get(name)}"
        for name, version in recorded.versions.items()
        if here.get(name) != version
    ]
    return [f"{picture} may not come out the same: {'; '.join(found)}"] if found else []


def _words(device: Any) -> str:
    threads = "" if device.threads is None else f" with {device.threads} threads"
    return f"{device.kind} ({device.name}){threads}"


def _make_pictures(engine: "Engine", request: "GenerationRequest", folder: Path) -> int:
    """Make, write and list the pictures, with a progress bar on stderr."""
    from tqdm import tqdm

    from diffopt.engine.png import write_png

    written = 0
    layout = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
    with (
        _stop_at_interrupt() as stop,
        tqdm(total=request.steps * request.count, bar_format=layout, leave=False, file=sys.stderr) as bar,
    ):

        def on_step(progress: "Progress") -> None:
            bar.total = progress.iterations * progress.count
            bar.set_description_str(f"picture {progress.index + 1} of {progress.count}", refresh=False)
            bar.update(progress.index * progress.iterations + progress.iteration - bar.n)
            if progress.iteration == progress.iterations:
                bar.refresh()

        for picture in engine.generate(request, on_step=on_step, stop=stop):
            path = write_png(picture, folder)
            written += 1
            line = f"{path}  {picture.seconds:.2f} s  {picture.its:.2f} it/s  seed {picture.seed}"
            bar.clear()
            print(line, flush=True)
    if written < request.count:
        print(f"diffopt: interrupted; pictures in {folder}: {written} of {request.count}", file=sys.stderr)
        return INTERRUPTED
    return 0


@contextlib.contextmanager
def _stop_at_interrupt() -> Iterator[threading.Event]:
    """Within the block the first Ctrl-C sets the event, the second one interrupts at once."""
    stop = threading.Event()

    def on_interrupt(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
