"""`diffopt verify`: prove on this machine that a model's pictures stay the same, in numbers."""

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from diffopt.commands.output import print_whole
from diffopt.commands.progress import ProgressLines, end_line
from diffopt.commands.start import importing
from diffopt.errors import InputError

if TYPE_CHECKING:
    import torch

    from diffopt.bench.verify.record import Verification

PROMPTS = 8
"""By default: with the bundled model on two CPU cores the whole check then takes less than two minutes."""

FAILED = 1


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `verify`."""
    parser = commands.add_parser(
        "verify",
        help="prove that the pictures stay the same here",
        description=(
            "Make the certificate of a model on this machine: each layer shape against float64, denoising steps on "
            "stock's own latents, whole pictures beside those of stock's backends. Exit code 1 if it fails or is void."
        ),
    )
    add = parser.add_argument
    add("-m", "--model", default="emoji", help="as `diffopt generate` takes it (default: %(default)s)")
    add("--device", help="cpu, cuda or cuda:N (default: the first GPU, or the CPU without one)")
    add("--attention", metavar="BACKEND", help="auto, or a backend that `diffopt doctor` lists (default: auto)")
    add("--prompts", default=str(PROMPTS), metavar="N", help="pictures to compare (default: %(default)s; 100: all)")
    add("--steps", metavar="N", help="denoising steps of each (default: the model's; on a CPU at most 10)")
    add("--scheduler", metavar="NAME", help="as `diffopt generate` takes it (default: the model's own)")
    add("--guidance", metavar="SCALE", help="guidance scale; 1 is none (default: the model's)")
    add("--json", action="store_true", help="the whole certificate, as JSON")
    add("--output", type=Path, metavar="FILE", help="keep the certificate as JSON in this file too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check, print and remember; exit code 0, or 1 for a certificate that failed or is void."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in `bench`
    from diffopt.commands.quiet import quiet_libraries, quiet_progress_bars

    prompts = _count("--prompts", arguments.prompts)
    steps = None if arguments.steps is None else _count("--steps", arguments.steps)
    guidance = None if arguments.guidance is None else _scale("--guidance", arguments.guidance)
    _check_model(arguments.model)
    if arguments.scheduler is not None:
        _check_scheduler(arguments.scheduler, steps)
    quiet_libraries()
    with importing():
        from diffopt.attention.backends import AUTO, forced
        from diffopt.bench.verify.run import verify, verify_case
        from diffopt.models import resolve_device

        device = resolve_device(arguments.device)
        attention = arguments.attention or AUTO
        if attention != AUTO:
            forced(attention, device)
        if arguments.output is not None:
            _check_output(arguments.output)
        case = verify_case(arguments.model, device, prompts=prompts, steps=steps, guidance=guidance)
    quiet_progress_bars()
    try:
        found = verify(case, device, attention=attention, scheduler=arguments.scheduler, progress=ProgressLines(""))
    finally:
        end_line()
    note = _remember(found, device, usual=arguments.scheduler is None and guidance is None)
    if arguments.output is not None:  # before anything is printed: a reader that leaves early must not cost the file
        _keep(found, arguments.output)
    _print(found, arguments, note)
    return 0 if found.passed else FAILED


def _count(option: str, text: str) -> int:
    try:
        count = int(text) if text.isascii() and text.isdigit() else 0
    except ValueError:  # Python reads no number of thousands of digits
        count = 0
    if not 1 <= count <= 1000:
        raise InputError(option, text, "a whole number from 1 to 1000 is needed")
    return count


def _scale(option: str, text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 0 <= scale <= 100:  # NaN is neither
        raise InputError(option, text, "a number from 0 to 100 is needed; 1 or less is no guidance")
    return scale


def _check_scheduler(name: str, steps: int | None) -> None:
    from diffopt.models.schedulers import SCHEDULERS, check_scheduler

    most = SCHEDULERS[check_scheduler(name)].max_steps
    if most is not None and steps is not None and steps > most:
        raise InputError("--steps", str(steps), f"the scheduler {name} takes at most {most}")


def _check_model(model: str) -> None:
    """Refuse an unknown model before anything heavy is imported."""
    from diffopt.bench.random_configs import KINDS, random_kind
    from diffopt.models import find_model

    kind = random_kind(model)
    if kind is None:
        find_model(model)
    elif kind not in KINDS:
        raise InputError("model", model, f"random weights of: {', '.join(KINDS)}")


def _check_output(path: Path) -> None:
    """Find out before the work that the certificate can be kept.

    Raises:
        RecordError: it can't.
    """
    from diffopt.bench.schema import RecordError
    from diffopt.whole_file import check_whole

    try:
        check_whole(path)
    except OSError as error:
        raise RecordError(f"{path}: can't be written: {error.strerror}") from error


def _keep(found: "Verification", path: Path) -> None:
    """The certificate as JSON in a file.

    Raises:
        RecordError: it can't be written.
    """
    from diffopt.bench.schema import RecordError
    from diffopt.bench.verify.tables import verification_json
    from diffopt.whole_file import write_whole

    try:
        write_whole(path, verification_json(found) + "\n")
    except OSError as error:
        raise RecordError(f"{path}: can't be written: {error.strerror}") from error


def _print(found: "Verification", arguments: argparse.Namespace, note: str) -> None:
    """On stdout the certificate."""
    import sys

    from diffopt.bench.verify.tables import verification_json, verification_parts
    from diffopt.commands.report import print_parts

    if arguments.json:
        print_whole(verification_json(found))
    else:
        print_parts(verification_parts(found))
    if note:
        print(note, file=sys.stderr)


def _remember(found: "Verification", device: "torch.device", *, usual: bool) -> str:
    """Keep a pass for the pictures made after it, and forget an earlier one after a failure; a note if it can't be.

    A pass with another scheduler or guidance than the model's (not `usual`) leaves an earlier one as it is: most
    pictures are made with the model's, and without guidance no layer has the shapes of theirs.
    """
    if found.passed and not usual:
        return ""
    from diffopt.attention.verified import Entry, Verified, remember_verified, verified_file, verified_key

    pictures = found.free_running
    each = pictures.ours.distributions()
    psnr, ssim, largest = each["psnr_db"], each["ssim"], each["max_difference"]
    entry = None
    if found.passed and psnr is not None and largest is not None:
        worst = found.exactness.worst
        verified = Verified(
            id=found.id,
            time_utc=found.environment.time_utc,
            layer_share=_short(max(layer.share for layer in found.layers)),
            step_share=_short(worst.ours / worst.allowed) if worst else 0.0,
            pictures=pictures.prompts,
            identical=pictures.ours.identical,
            psnr_db=None if math.isinf(psnr.worst) else _short(psnr.worst),
            ssim=None if ssim is None else round(ssim.worst, 5),
            max_difference=int(largest.worst),
        )
        entry = Entry(verified, {layer.shape: layer.backend for layer in found.layers})
    key = verified_key(device, model_hash=found.model.hash, dtype=found.dtype, attention=found.attention)
    try:
        remember_verified(key, entry)
    except OSError as error:
        return f"diffopt: note: {verified_file()} can't be written ({error.strerror}); pictures won't name this check"
    return ""


def _short(value: float) -> float:
    return float(f"{value:.3g}")
