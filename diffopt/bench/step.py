"""Stock against optimized denoising steps: exactness first, then peak memory and speed, into one record."""

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch

from diffopt.attention.backends import AUTO
from diffopt.bench.contenders import Subject, load_subject, twin
from diffopt.bench.disturbance import Watch
from diffopt.bench.free_running import free_running, other_backend
from diffopt.bench.free_running_record import FreeRunning
from diffopt.bench.loop_clock import LoopTime, time_loop
from diffopt.bench.picture_clock import PICTURE_CLOCK, PictureTime, pictures_of, time_pictures
from diffopt.bench.record import Comparison, Contender, Method, StepRecord, Workload
from diffopt.bench.step_check import check_steps
from diffopt.bench.workloads import Case
from diffopt.gpus import Price
from diffopt.handle import Handle, optimize
from diffopt.measure.environment import clocks, environment
from diffopt.measure.memory import PeakMemory, peak_memory
from diffopt.measure.teacher_forced import (
    Certificate,
    UNetCall,
    record_unet_calls,
    spread_out,
    stock_forwards,
)
from diffopt.measure.timing import Samples, Spread, device_seconds, interleaved, paired_ratio

STOCK, OPTIMIZED = "stock", "optimized"
_CLOCK = (
    "loop: host clock between device synchronisations, from the pipeline's first step to its last latent; "
    "unet: device events on CUDA, host clock on a CPU"
)

OnPictures = Callable[[str, Any, Any], None]
"""Given the case's name and the first picture of stock and of optimized, made from one seed."""

Progress = Callable[[str, int, int], None]
"""Told the stage, how much of it is done and how much there is."""


def _silent(*_: object) -> None:
    pass


@dataclasses.dataclass
class _Run:
    """What one case needs from stage to stage."""

    case: Case
    subject: Subject
    optimized: Any
    handle: Handle
    calls: list[UNetCall]
    outputs: list[torch.Tensor]
    progress: Progress
    first_call_s: dict[str, float]
    memory: dict[str, PeakMemory]


def run_case(
    workload: str,
    case: Case,
    *,
    device: torch.device | str,
    attention: str = AUTO,
    price: Price | None = None,
    progress: Progress = _silent,
    on_pictures: OnPictures = _silent,
) -> StepRecord:
    """Measure one case of a workload.

    Two pipelines with equal weights are kept, stock and optimized, so that switching costs nothing between
    interleaved rounds. Their exactness is checked before anything is timed; when it fails or is void the record has
    no speeds. Interrupted by Ctrl-C after the check, the record keeps what was complete.

    Args:
        workload: the workload's name, for the record.
        attention: what `optimize` is asked for.
        price: of an hour on this machine, for the record.
    """
    device = torch.device(device)
    run = _prepare(case, device, attention, progress)
    certificate = _check(run, attention)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    parts: dict[str, Any] = {}
    pictures: FreeRunning | None = None
    interrupted = False
    if certificate.passed:
        try:
            pictures = _free_running(run)
            if pictures is None or pictures.finite:
                parts, interrupted = _measure(run, on_pictures)
        except KeyboardInterrupt:
            interrupted = True
    return StepRecord(
        environment=environment(device),
        workload=_workload(workload, run),
        attention=attention,
        exactness=certificate,
        plan=run.handle.summary(),
        interrupted=interrupted,
        price=price,
        free_running=pictures,
        **parts,
    )


def _prepare(case: Case, device: torch.device, attention: str, progress: Progress) -> _Run:
    progress("load the model", 0, 1)
    subject = load_subject(case, device)
    pipe, arguments = subject.pipe, subject.arguments
    optimized = twin(pipe)
    progress("first calls and peak memory", 0, 2)
    times: list[LoopTime] = []
    calls, outputs = record_unet_calls(pipe.unet, lambda: times.append(time_loop(pipe, arguments())))
    memory = {STOCK: _memory_alone(pipe, optimized, arguments, device)}
    progress("first calls and peak memory", 1, 2)
    handle = optimize(optimized, attention=attention)
    times.append(time_loop(optimized, arguments()))
    memory[OPTIMIZED] = _memory_alone(optimized, pipe, arguments, device)
    first_call_s = {STOCK: times[0].call_s, OPTIMIZED: times[1].call_s}
    return _Run(case, subject, optimized, handle, calls, outputs, progress, first_call_s, memory)


def _memory_alone(pipe: Any, other: Any, arguments: Callable[[], dict[str, Any]], device: torch.device) -> PeakMemory:
    """Peak memory of one contender while the other one's UNet is away (but not on a CPU: there both hold both).

    Its own weights leave and come back too, into an emptied allocator: where they lay before would decide how much is
    reserved (measured: 18% more for the contender that was moved, with equal bytes allocated).
    """
    if device.type == "cuda":
        pipe.unet.to("cpu")
        other.unet.to("cpu")
        gc.collect()
        torch.cuda.empty_cache()
        pipe.unet.to(device)
    memory = peak_memory(lambda: time_loop(pipe, arguments()), device)
    other.unet.to(device)
    return memory


def _check(run: _Run, attention: str) -> Certificate:
    """The teacher-forced step rule."""
    steps = spread_out(len(run.calls), run.case.exactness_steps)
    run.progress("exactness", 0, len(steps))
    return check_steps(
        run.subject.pipe,
        run.optimized,
        run.calls,
        run.outputs,
        attention=attention,
        steps=steps,
        on_step=lambda done: run.progress("exactness", done, len(steps)),
    )


def _free_running(run: _Run) -> FreeRunning | None:
    """Whole pictures of several prompts, where the case asks for them."""
    stock, prompts = run.subject.pipe, run.case.free_running_prompts
    if not prompts:
        return None
    run.progress("pictures of several prompts", 0, prompts)
    return free_running(
        stock,
        run.optimized,
        run.subject.prompt_arguments,
        prompts=prompts,
        other=other_backend(run.calls[0], run.outputs[0], stock_forwards(stock.unet)),
        on_picture=lambda done: run.progress("pictures of several prompts", done, prompts),
    )


def _measure(run: _Run, on_pictures: OnPictures) -> tuple[dict[str, Any], bool]:
    case, device = run.case, run.subject.pipe.unet.device
    before, watch = clocks(device), Watch(device)
    unet = _unet_forwards(run)
    if unet.interrupted:
        raise KeyboardInterrupt
    loops = _rounds(run, "denoising loops", _loop, case.repetitions, case.warmup, watch)
    pictures = Samples({STOCK: [], OPTIMIZED: []}, loops.interrupted)
    if case.picture_repetitions and not loops.interrupted:
        try:
            pictures = _rounds(run, "whole pictures", _picture, case.picture_repetitions, case.picture_warmup, watch)
        except KeyboardInterrupt:  # before their first round: the loops are kept
            pictures = dataclasses.replace(pictures, interrupted=True)
    if pictures.by_name[STOCK]:
        on_pictures(case.name, *(pictures.by_name[name][-1].images[0] for name in (STOCK, OPTIMIZED)))
    contenders = {name: _contender(run, name, loops, unet, pictures) for name in (STOCK, OPTIMIZED)}
    method = Method(
        clock=_CLOCK,
        warmup=case.warmup,
        repetitions=case.repetitions,
        unet_warmup=case.unet_warmup,
        unet_repetitions=case.unet_repetitions,
        first_call_s=run.first_call_s,
        clocks_before=before,
        clocks_after=clocks(device),
        pictures=PICTURE_CLOCK if pictures.by_name[STOCK] else None,
        flags=watch.flags(),
    )
    return {"method": method, "comparison": _compare(**contenders), **contenders}, pictures.interrupted


def _unet_forwards(run: _Run) -> Samples:
    case, device = run.case, run.subject.pipe.unet.device
    call = run.calls[len(run.calls) // 2]
    return interleaved(
        {name: (lambda pipe=pipe: call.run(pipe.unet)) for name, pipe in _pipes(run).items()},
        repetitions=case.unet_repetitions,
        warmup=case.unet_warmup,
        measure=lambda forward: device_seconds(forward, device),
        on_sample=lambda _, number: run.progress("UNet forwards", max(0, number + 1), case.unet_repetitions),
    )


def _rounds(
    run: _Run, stage: str, sample: Callable[[_Run, Any], Any], repetitions: int, warmup: int, watch: Watch
) -> Samples:
    """Stock and optimized in turn, looking at the GPU after each measured sample."""

    def on_sample(_: str, number: int) -> None:
        if number >= 0:
            watch.look()
        run.progress(stage, max(0, number + 1), repetitions)

    return interleaved(
        {name: (lambda pipe=pipe: sample(run, pipe)) for name, pipe in _pipes(run).items()},
        repetitions=repetitions,
        warmup=warmup,
        measure=lambda one: one(),
        on_sample=on_sample,
    )


def _loop(run: _Run, pipe: Any) -> LoopTime:
    return time_loop(pipe, run.subject.arguments())


def _picture(run: _Run, pipe: Any) -> PictureTime:
    return time_pictures(pipe, run.subject.whole_arguments())


def _pipes(run: _Run) -> dict[str, Any]:
    return {STOCK: run.subject.pipe, OPTIMIZED: run.optimized}


def _contender(run: _Run, name: str, loops: Samples, unet: Samples, pictures: Samples) -> Contender:
    times: list[LoopTime] = loops.by_name[name]
    loop_s, call_s = [time.loop_s for time in times], [time.call_s for time in times]
    unet_s: list[float] = unet.by_name[name]
    loop, forward = Spread.of(loop_s), Spread.of(unet_s)
    whole: list[PictureTime] = pictures.by_name[name]
    return Contender(
        loop_s=loop_s,
        call_s=call_s,
        unet_s=unet_s,
        loop=loop,
        call=Spread.of(call_s),
        unet=forward,
        loop_its=run.case.steps / loop.median,
        unet_its=1 / forward.median,
        memory=run.memory[name],
        pictures=pictures_of(whole, run.case.batch) if whole else None,
    )


def _compare(*, stock: Contender, optimized: Contender) -> Comparison:
    ours, theirs = optimized.memory.headline, stock.memory.headline
    return Comparison(
        loop=paired_ratio(stock.loop_s, optimized.loop_s),
        unet=paired_ratio(stock.unet_s, optimized.unet_s),
        peak_memory=ours / theirs if ours and theirs else None,
        pictures=paired_ratio(stock.pictures.whole_s, optimized.pictures.whole_s)
        if stock.pictures and optimized.pictures
        else None,
    )


def _workload(name: str, run: _Run) -> Workload:
    case, pipe = run.case, run.subject.pipe
    return Workload(
        name=name,
        case=case.name,
        model=run.subject.identity,
        dtype=str(pipe.unet.dtype).removeprefix("torch."),
        width=case.width,
        height=case.height,
        batch=case.batch,
        steps=case.steps,
        unet_calls=len(run.calls),
        scheduler=type(pipe.scheduler).__name__,
        guidance=case.guidance,
        seed=case.seed,
    )
