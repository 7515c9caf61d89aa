"""From a case's samples to its record: contenders, their comparison, and what was run."""

from typing import Any

from diffopt.bench.step.contenders import Subject
from diffopt.bench.step.loop_clock import LoopTime
from diffopt.bench.step.picture_clock import PictureTime, pictures_of
from diffopt.bench.step.record import Comparison, Contender, Workload
from diffopt.bench.workloads import Case
from diffopt.measure.memory import PeakMemory
from diffopt.measure.timing import Samples, Spread, paired_ratio


def contender_of(
    name: str, case: Case, memory: PeakMemory, *, loops: Samples, unet: Samples, pictures: Samples
) -> Contender:
    """One contender's samples: `LoopTime`s, seconds of UNet forwards, and `PictureTime`s, which may be none."""
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
        loop_its=case.steps / loop.median,
        unet_its=1 / forward.median,
        memory=memory,
        pictures=pictures_of(whole, case.batch) if whole else None,
    )


def compare(*, stock: Contender, optimized: Contender) -> Comparison:
    """Optimized against stock."""
    ours, theirs = optimized.memory.headline, stock.memory.headline
    return Comparison(
        loop=paired_ratio(stock.loop_s, optimized.loop_s),
        unet=paired_ratio(stock.unet_s, optimized.unet_s),
        peak_memory=ours / theirs if ours and theirs else None,
        pictures=paired_ratio(stock.pictures.whole_s, optimized.pictures.whole_s)
        if stock.pictures and optimized.pictures
        else None,
    )


def workload_of(name: str, case: Case, subject: Subject, unet_calls: int) -> Workload:
    """What was run; `name` is the workload's, `unet_calls` how many a pipeline call makes."""
    pipe: Any = subject.pipe
    return Workload(
        name=name,
        case=case.name,
        model=subject.identity,
        dtype=str(pipe.unet.dtype).removeprefix("torch."),
        width=case.width,
        height=case.height,
        batch=case.batch,
        steps=case.steps,
        unet_calls=unet_calls,
        scheduler=type(pipe.scheduler).__name__,
        guidance=case.guidance,
        seed=case.seed,
        decode=case.decode,
    )
