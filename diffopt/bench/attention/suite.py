"""Ours and every peer on a list of attention shapes: each in its own process, checked first, then timed in turn.

Only one process works on the GPU at a time, except before the first shape, when all of them compile at once.
"""

import dataclasses
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from diffopt.bench.attention.clock import CLOCK
from diffopt.bench.attention.inputs import SEED
from diffopt.bench.attention.peers import PEERS, Peer
from diffopt.bench.attention.record import (
    AttentionFigure,
    AttentionMethod,
    AttentionRecord,
    AttentionRule,
    State,
    exact,
)
from diffopt.bench.attention.worker_process import Answer, WorkerProcess
from diffopt.bench.workloads import AttentionShape, AttentionWorkload
from diffopt.measure.ceilings import Ceilings
from diffopt.measure.environment import clocks, environment

Progress = Callable[[str, str, int, int], None]
"""Told the shape, the stage, how much of it is done and how much there is."""

_WORKER = "diffopt.bench.attention.worker:contender_process"
_JUDGE = "diffopt.bench.attention.judge:judge_process"
_ANSWER_S = 90.0  # for one check or sample; the longest take seconds
_COMPILE_S = 120.0
_ORDER = "interleaved, each round starting with the next contender"


class Asked(Protocol):
    """A process that answers commands (`WorkerProcess`)."""

    def start(self) -> None: ...
    def ask(self, command: str, *arguments: Any, timeout: float) -> Answer: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Team:
    """The processes of one run: one per contender, by its name, and the judge."""

    workers: Mapping[str, Asked]
    judge: Asked

    @classmethod
    def on(cls, device: torch.device, peers: Sequence[Peer]) -> "Team":
        """Real processes on a device."""
        workers = {peer.name: WorkerProcess(peer.name, _WORKER, peer.name, str(device)) for peer in peers}
        return cls(workers, WorkerProcess("judge", _JUDGE, str(device)))

    def everyone(self) -> list[Asked]:
        return [*self.workers.values(), self.judge]


@dataclasses.dataclass
class _Run:
    """What one run needs from shape to shape; `gone` is why a contender has no figure, by name or by name and shape."""

    workload: str
    headline: tuple[str, ...]
    rounds: int
    device: torch.device
    peers: Sequence[Peer]
    team: Team
    progress: Progress
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    versions: dict[str, str | None] = dataclasses.field(default_factory=dict)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    gone: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    ceilings: Ceilings | None = None


def run_attention(
    name: str,
    workload: AttentionWorkload,
    shapes: Sequence[AttentionShape],
    *,
    device: torch.device,
    on_record: Callable[[AttentionRecord], None],
    progress: Progress = lambda *_: None,
    peers: Sequence[Peer] | None = None,
    team: Team | None = None,
) -> None:
    """Measure `shapes` of a workload; each shape's record goes to `on_record` as soon as it is complete.

    A contender that crashes, hangs or runs out of memory loses its figure of that shape and nothing else.

    Args:
        name: of the workload, for the record.
        device: a CUDA device that nobody else uses.
        peers: the contenders, ours first; all known ones by default.
        team: their processes; started here by default. Closed at the end in any case.
    """
    peers = list(PEERS.values()) if peers is None else peers
    team = Team.on(device, peers) if team is None else team
    run = _Run(name, workload.headline, workload.rounds, device, peers, team, progress)
    try:
        _start(run)
        _compile(run, shapes)
        for shape in shapes:
            on_record(_measure(run, shape))
    finally:
        for process in team.everyone():
            process.close()


def _start(run: _Run) -> None:
    """Start every process, ask who can run here, and measure what the GPU reaches at most."""
    run.progress("all shapes", "start the contenders", 0, len(run.peers))
    for process in run.team.everyone():
        process.start()

    def greet(peer: Peer) -> None:
        answer = run.team.workers[peer.name].ask("hello", timeout=_COMPILE_S)
        if answer.status != "ok":
            run.absent[peer.name] = answer.why
        else:
            run.versions[peer.name] = answer.value["version"]
            if answer.value["reasons"]:
                run.absent[peer.name] = "; ".join(answer.value["reasons"])

    _all_at_once(run, greet, run.peers)
    run.progress("all shapes", "measure the ceilings", 0, 1)
    run.ceilings = run.team.judge.ask("ceilings", timeout=_ANSWER_S).value


def _compile(run: _Run, shapes: Sequence[AttentionShape]) -> None:
    """Every contender that compiles calls each shape once, all at the same time: nothing is measured yet.

    A process that dies of a shape here is not asked for that shape again; exceptions come back when it is checked.
    """
    present = [peer for peer in run.peers if peer.name not in run.absent and peer.warms_up]
    done = [0]

    def warm_up(peer: Peer) -> None:
        for shape in shapes:
            answer = run.team.workers[peer.name].ask("warm_up", shape, timeout=_COMPILE_S)
            if answer.status == "failed" and answer.died:
                run.gone[peer.name, shape.name] = answer.why
            done[0] += 1
            run.progress("all shapes", "compile", done[0], len(present) * len(shapes))

    _all_at_once(run, warm_up, present)


def _all_at_once(run: _Run, what: Callable[[Peer], None], peers: Sequence[Peer]) -> None:
    """`what` for every contender, in threads; Ctrl-C closes the processes, which ends the threads."""
    with ThreadPoolExecutor(max(1, len(peers))) as pool:
        try:
            list(pool.map(what, peers))
        except BaseException:
            for process in run.team.everyone():
                process.close()
            raise


def _measure(run: _Run, shape: AttentionShape) -> AttentionRecord:
    rules, failure = _rules(run, shape)
    figures: dict[str, AttentionFigure] = {}
    with tempfile.TemporaryDirectory(prefix="diffopt-outputs-") as folder:
        for done, peer in enumerate(run.peers):
            run.progress(shape.name, "check", done, len(run.peers))
            figures[peer.name] = _checked(run, peer, shape, rules, failure.get(peer.dtype, ""), folder)
    run.team.judge.ask("release", timeout=_ANSWER_S)
    before = clocks(run.device)
    figures |= _timed(run, shape, [figures[peer.name] for peer in run.peers])
    return AttentionRecord(
        environment=environment(run.device),
        workload=run.workload,
        run=run.id,
        headline=run.headline,
        shape=shape,
        ceilings=run.ceilings,
        rules=rules,
        figures=[figures[peer.name] for peer in run.peers],
        method=AttentionMethod(
            clock=CLOCK,
            order=_ORDER,
            rounds=run.rounds,
            seed=SEED,
            clocks_before=before,
            clocks_after=clocks(run.device),
        ),
    )


def _rules(run: _Run, shape: AttentionShape) -> tuple[list[AttentionRule], dict[str, str]]:
    """What is allowed, for each dtype that a contender has; and why not, by dtype."""
    rules: list[AttentionRule] = []
    failure = {}
    dtypes = dict.fromkeys(peer.dtype for peer in run.peers)
    for done, dtype in enumerate(dtypes):
        run.progress(shape.name, "compute in float64", done, len(dtypes))
        answer = run.team.judge.ask("rules", shape, dtype, timeout=_ANSWER_S)
        if answer.status == "ok":
            rules += answer.value
        else:
            failure[dtype] = f"there is nothing to check against: {answer.why}"
    return rules, failure


def _checked(
    run: _Run, peer: Peer, shape: AttentionShape, rules: list[AttentionRule], failure: str, folder: str
) -> AttentionFigure:
    """The figure of one contender before it is timed."""

    def figure(state: State, why: str, **more: Any) -> AttentionFigure:
        return AttentionFigure(
            name=peer.name,
            dtype=peer.dtype,
            required=peer.required,
            state=state,
            why=why,
            version=run.versions.get(peer.name),
            **more,
        )

    if peer.name in run.absent:
        return figure("absent", run.absent[peer.name], install=peer.install)
    if (peer.name, shape.name) in run.gone:
        return figure("failed", run.gone[peer.name, shape.name])
    if failure:
        return figure("void", failure)
    answer = run.team.workers[peer.name].ask("outputs", shape, folder, timeout=_ANSWER_S)
    if answer.status != "ok":
        return figure(answer.status, answer.why)
    judged = run.team.judge.ask("errors", peer.dtype, peer.name, folder, timeout=_ANSWER_S)
    if judged.status != "ok":
        return figure("failed", f"its output could not be judged: {judged.why}", **answer.value)
    checked = figure("right", "", errors=judged.value, **answer.value)
    if exact(checked, rules):
        return checked
    if any(rule.void for rule in rules if rule.dtype == peer.dtype):
        return checked.model_copy(update={"state": "void", "why": "the planted fault passed the check"})
    return checked.model_copy(update={"state": "wrong", "why": _distance(checked, rules)})


def _distance(figure: AttentionFigure, rules: list[AttentionRule]) -> str:
    """The first check that was missed, in words."""
    mine = [rule for rule in rules if rule.dtype == figure.dtype]
    rule = next(rule for rule in mine if not figure.errors[rule.content].within(rule.limit))
    errors = figure.errors[rule.content]
    return (
        f"{rule.content}: L2 {errors.relative_l2:.2e} of {rule.limit.relative_l2:.2e} allowed, "
        f"maximum {errors.maximum:.2e} of {rule.limit.maximum:.2e}"
    )


def _timed(run: _Run, shape: AttentionShape, checked: Sequence[AttentionFigure]) -> dict[str, AttentionFigure]:
    """The figures of those that were right, timed in turn; one that fails on the way loses all its samples."""
    right = {figure.name: figure for figure in checked if figure.state == "right"}
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in right}
    failed: dict[str, AttentionFigure] = {}
    for number in range(run.rounds):
        run.progress(shape.name, "time", number, run.rounds)
        for name in rotated(list(right), number):
            if name in failed:
                continue
            answer = run.team.workers[name].ask("time", shape, timeout=_ANSWER_S)
            if answer.status == "ok":
                samples[name].append(answer.value)
            else:
                failed[name] = right[name].model_copy(update={"state": answer.status, "why": answer.why})
    for name in right:
        if name not in failed:
            run.team.workers[name].ask("release", timeout=_ANSWER_S)
    return failed | {name: _with_times(right[name], samples[name]) for name in right if name not in failed}


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: each round starts with the next name, so that none always follows the same one."""
    start = number % len(names) if names else 0
    return [*names[start:], *names[:start]]


def _with_times(figure: AttentionFigure, samples: list[dict[str, Any]]) -> AttentionFigure:
    table = {
        **figure.model_dump(),
        "state": "timed",
        "hot_us": [sample["hot_us"] for sample in samples],
        "cold_us": [sample["cold_us"] for sample in samples],
        "calls": samples[0]["calls"],
        "input_sets": samples[0]["input_sets"],
    }
    return AttentionFigure.model_validate(table)
