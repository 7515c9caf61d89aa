"""Denoising steps, stock, optimized and peers in turn: exactness first, then memory and speed, into one record."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffopt.attention.backends import AUTO
from diffopt.bench.step.check import check_steps
from diffopt.bench.step.contenders import Subject, load_subject, twin
from diffopt.bench.step.disturbance import Watch
from diffopt.bench.step.free_running import free_running, other_backend
from diffopt.bench.step.free_running_record import FreeRunning
from diffopt.bench.step.loop_clock import LoopTime, quiet, time_loop
from diffopt.bench.step.peers import Judge, Peer, forget, peer_record, prepare_peer
from diffopt.bench.step.picture_clock import PICTURE_CLOCK, PictureTime, time_pictures
from diffopt.bench.step.record import Method, StepRecord
from diffopt.bench.step.samples import compare, contender_of, workload_of
from diffopt.bench.step.warm_start import RUNS, measure_warm_start
from diffopt.bench.step.warm_start_record import WarmStart
from diffopt.bench.verify.decode_check import check_decode
from diffopt.bench.workloads import PEER_LIMIT_S, Case
from diffopt.errors import OptimizeError
from diffopt.gpus import Price
from diffopt.handle import Handle, optimize
from diffopt.measure.decoding import DecodeCertificate
from diffopt.measure.environment import clocks, environment
from diffopt.measure.memory import PeakMemory, give_back, peak_memory
from diffopt.measure.profile import profile_forward
from diffopt.measure.teacher_forced import (
    Certificate,
    UNetCall,
    record_unet_calls,
    spread_out,
    stock_forwards,
)
from diffopt.measure.timing import Samples, device_seconds, interleaved

STOCK, OPTIMIZED = "stock", "optimized"
_DECODED = 2
"""Pictures of a batch whose decode is checked: five copies of the VAE, one in float32, stand beside two pipelines. They
are those with the largest latents: where one picture's exceed the limit, the whole batch is decoded as stock does.
"""

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
    exact: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    peers: list[Peer] = dataclasses.field(default_factory=list)

    @property
    def call(self) -> UNetCall:
        """The one in the middle of the loop."""
        return self.calls[len(self.calls) // 2]


def run_case(
    workload: str,
    case: Case,
    *,
    device: torch.device | str,
    attention: str = AUTO,
    price: Price | None = None,
    peers: Sequence[str] | None = None,
    peer_limit_s: float = PEER_LIMIT_S,
    progress: Progress = _silent,
    on_pictures: OnPictures = _silent,
) -> StepRecord:
    """Measure one case of a workload.

    Pipelines with equal weights are kept, stock, optimized and a peer each, so that switching costs nothing between
    interleaved rounds. Our exactness is checked before anything is timed, of the steps and then of the decode where
    that isn't stock's; when one fails or is void the record has no speeds. A peer's own check or failure leaves out
    that peer. Interrupted by Ctrl-C after the checks, the record keeps what was complete.

    Args:
        workload: the workload's name, for the record.
        attention: what `optimize` is asked for.
        price: of an hour on this machine, for the record.
        peers: by name (`workloads.STEP_PEERS`); the case's own by default.
        peer_limit_s: a peer whose first call takes longer is left out.
    """
    device = torch.device(device)
    run = _prepare(case, device, attention, progress)
    certificate = _check(run, attention)
    give_back(device)
    decode, decode_why = _check_decode(run) if certificate.passed else (None, "")
    give_back(device)
    parts: dict[str, Any] = {}
    pictures: FreeRunning | None = None
    interrupted = False
    if certificate.passed and (decode.passed if decode else case.decode == "stock"):
        try:
            pictures = _free_running(run)
            if pictures is None or pictures.finite:
                _prepare_peers(run, case.peers if peers is None else peers, certificate, peer_limit_s)
                parts, interrupted = _measure(run, on_pictures)
                if not interrupted and device.type == "cuda":
                    progress("profile", 0, 1)
                    stock = run.subject.pipe.unet
                    parts["profile"] = profile_forward(run.call, run.optimized.unet, lambda: run.call.run(stock))
                if not interrupted and case.warm_start:
                    parts["warm_start"] = _warm_start(run, attention)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            forget(run.peers)
    return StepRecord(
        environment=environment(device),
        workload=workload_of(workload, case, run.subject, len(run.calls)),
        attention=attention,
        exactness=certificate,
        decode=decode,
        decode_why=decode_why,
        plan=run.handle.summary(),
        interrupted=interrupted,
        price=price,
        free_running=pictures,
        peers_left_out=() if peers is None else tuple(name for name in case.peers if name not in peers),
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
    whole = subject.whole_arguments
    memory = {STOCK: _memory_alone(pipe, optimized, whole, device)}
    progress("first calls and peak memory", 1, 2)
    handle = optimize(optimized, attention=attention, decode=case.decode)
    times.append(time_loop(optimized, arguments()))
    memory[OPTIMIZED] = _memory_alone(optimized, pipe, whole, device)
    first_call_s = {STOCK: times[0].call_s, OPTIMIZED: times[1].call_s}
    return _Run(case, subject, optimized, handle, calls, outputs, progress, first_call_s, memory)


def _memory_alone(pipe: Any, other: Any, arguments: Callable[[], dict[str, Any]], device: torch.device) -> PeakMemory:
    """Peak memory of a call, prompt to pixels, of one contender while the other one's models are away.

    On a CPU both are there. On a GPU its own weights leave and come back, too, into an emptied allocator: where they
    lay before would decide how much is reserved (measured: 18% more for the contender that was moved, with equal bytes
    allocated). What is measured is the second call after that; the first one captures anew.
    """
    mine, others = (pipe.unet, pipe.vae), (other.unet, other.vae)
    if device.type == "cuda":
        for model in (*mine, *others):
            model.to("cpu")
        give_back(device)
        for model in mine:
            model.to(device)
        time_pictures(pipe, arguments())
    memory = peak_memory(lambda: time_pictures(pipe, arguments()), device)
    for model in others:
        model.to(device)
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
        exact=run.exact,
    )


def _check_decode(run: _Run) -> tuple[DecodeCertificate | None, str]:
    """The certificate of what our VAE makes of a stock call's last latents, or why there is none; neither where it
    decodes as stock's, as asked.
    """
    if run.case.decode == "stock":
        return None, ""
    run.progress("exactness of the decode", 0, 1)
    pipe = run.subject.pipe
    with quiet(pipe):
        latents = pipe(**run.subject.arguments(), output_type="latent").images
    largest = latents.abs().flatten(1).amax(1).argsort(descending=True)[:_DECODED]
    try:
        return check_decode(run.optimized, latents[largest]), ""
    except OptimizeError as error:
        return None, str(error)


def _warm_start(run: _Run, attention: str) -> WarmStart:
    device = run.subject.pipe.unet.device
    give_back(device)  # the other process needs some
    return measure_warm_start(
        run.case,
        run.subject.pipe,
        device=device,
        attention=attention,
        summary=run.handle.summary(),
        on_run=lambda done: run.progress("warm start", done, RUNS),
    )


def _prepare_peers(run: _Run, names: Sequence[str], certificate: Certificate, limit_s: float) -> None:
    judge = Judge(run.calls, run.outputs, run.exact, certificate)
    for name in names:
        run.progress(f"peer {name}: first call and exactness", 0, 1)
        run.peers.append(prepare_peer(name, run.subject.pipe, run.subject.arguments, judge, limit_s))


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
    loops = _rounds(run, "denoising loops", _all(run, _loop), case.repetitions, case.warmup, watch)
    forget(run.peers)  # pictures are made by two contenders; the others' memory is theirs meanwhile
    pictures = Samples({STOCK: [], OPTIMIZED: []}, loops.interrupted)
    if case.picture_repetitions and not loops.interrupted:
        try:
            two = _both(run, _picture)
            pictures = _rounds(run, "whole pictures", two, case.picture_repetitions, case.picture_warmup, watch)
        except KeyboardInterrupt:  # before their first round: the loops are kept
            pictures = dataclasses.replace(pictures, interrupted=True)
    if pictures.by_name[STOCK]:
        on_pictures(case.name, *(pictures.by_name[name][-1].images[0] for name in (STOCK, OPTIMIZED)))
    samples = {"loops": loops, "unet": unet, "pictures": pictures}
    contenders = {name: contender_of(name, case, run.memory[name], **samples) for name in (STOCK, OPTIMIZED)}
    peers = [peer_record(peer, loops, unet, ours=OPTIMIZED, steps=case.steps) for peer in run.peers]
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
    parts = {"method": method, "comparison": compare(**contenders), "peers": peers, **contenders}
    return parts, pictures.interrupted


def _unet_forwards(run: _Run) -> Samples:
    case = run.case
    return interleaved(
        _all(run, _forward),
        repetitions=case.unet_repetitions,
        warmup=case.unet_warmup,
        measure=lambda one: one(),
        on_sample=lambda _, number: run.progress("UNet forwards", max(0, number + 1), case.unet_repetitions),
    )


def _rounds(
    run: _Run, stage: str, contenders: Mapping[str, Callable[[], Any]], repetitions: int, warmup: int, watch: Watch
) -> Samples:
    """Every contender in turn, looking at the GPU after each measured sample."""

    def on_sample(_: str, number: int) -> None:
        if number >= 0:
            watch.look()
        run.progress(stage, max(0, number + 1), repetitions)

    return interleaved(
        contenders, repetitions=repetitions, warmup=warmup, measure=lambda one: one(), on_sample=on_sample
    )


def _both(run: _Run, sample: Callable[[_Run, Any], Any]) -> dict[str, Callable[[], Any]]:
    """Stock and optimized, each with what makes a sample of it."""
    pipes = {STOCK: run.subject.pipe, OPTIMIZED: run.optimized}
    return {name: (lambda pipe=pipe: sample(run, pipe)) for name, pipe in pipes.items()}


def _all(run: _Run, sample: Callable[[_Run, Any], Any]) -> dict[str, Callable[[], Any]]:
    """The same with every peer that runs; one that fails has no further samples."""
    peers = {
        peer.name: (lambda peer=peer: peer.sample(lambda pipe: sample(run, pipe)))
        for peer in run.peers
        if peer.pipe is not None
    }
    return _both(run, sample) | peers


def _forward(run: _Run, pipe: Any) -> float:
    return device_seconds(lambda: run.call.run(pipe.unet), pipe.unet.device)


def _loop(run: _Run, pipe: Any) -> LoopTime:
    return time_loop(pipe, run.subject.arguments())


def _picture(run: _Run, pipe: Any) -> PictureTime:
    return time_pictures(pipe, run.subject.whole_arguments())
