"""Equal pipelines, one with captured UNet calls and one without, to which tests do the same.

`Tape` stands in for CUDA graphs: what is computed apart from steps changes only when it is played back, and no Python
runs then, so what is left out wrongly shows in the pictures. The reference runs uncaptured, with the same shared
products.
"""

import threading

import torch
from pipelines import picture
from recorders import Recorder, Tape, products_row_by_row
from tiny_model import tiny_pipeline

import diffopt
from diffopt.unet import fused

SIDE = {"width": 16, "height": 16}


class Off(Recorder):
    """Captures nothing."""

    def reasons(self, device):
        return ["not now"]


class Twins:
    """Equal pipelines, one captured and one not, to which the same is done.

    With `recorder`, something else than a `Tape` records: a `Recorder` for who counts what Python does in playbacks.
    """

    def __init__(
        self,
        monkeypatch,
        stages: tuple[str, ...] = (fused.SHARED,),
        recorder: Recorder | None = None,
        **unet_options,
    ):
        self.captured, self.reference = tiny_pipeline(**unet_options), tiny_pipeline(**unet_options)
        for pipe in (self.captured, self.reference):
            pipe.set_progress_bar_config(disable=True)
            pipe.unet.requires_grad_(False)
        products_row_by_row(monkeypatch)
        self.recorder = Tape() if recorder is None else recorder
        self.handle = optimized(monkeypatch, self.captured, self.recorder)
        optimized(monkeypatch, self.reference, Off())
        for pipe in self.both:
            fused.put_on(pipe.unet, frozenset(stages))

    @property
    def both(self) -> tuple:
        return self.captured, self.reference

    @property
    def prologues(self) -> int:
        return self.handle.summary()["step"]["prologues"]

    @property
    def tables(self) -> int:
        return self.handle.summary()["step"]["tables"]

    def same(self, work) -> torch.Tensor:
        """What a function makes of the captured pipeline, which must be what it makes of the other, bit for bit."""
        ours, expected = work(self.captured), work(self.reference)
        assert torch.equal(ours, expected)
        return ours

    def take_turns(self, timesteps) -> None:
        """Threads call the captured UNet at once, each at all timesteps for a prompt of its own."""
        contexts = [prompt(seed) for seed in range(3)]
        expected = [[call(self.reference, x, t) for t in timesteps] for x in contexts]
        found: list[list[torch.Tensor]] = [[] for _ in contexts]

        def work(index):
            for timestep in timesteps:
                found[index].append(call(self.captured, contexts[index], timestep))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for ours, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def same_picture(self, **options) -> torch.Tensor:
        return self.same(lambda pipe: picture(pipe, "bundled", **{"steps": 4, **SIDE, **options}))


def optimized(monkeypatch, pipe, capturer):
    monkeypatch.setattr("diffopt.handle.CudaCapturer", lambda: capturer)
    handle = diffopt.optimize(pipe)
    fused.put_on(pipe.unet, frozenset((fused.SHARED,)))
    return handle


def prompt(seed: int = 0, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 77, 16, generator=torch.Generator().manual_seed(seed))


def call(pipe, context, timestep=7, side: int = 8, **keywords) -> torch.Tensor:
    sample = torch.randn(context.shape[0], 4, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return pipe.unet(sample, timestep, context, return_dict=False, **keywords)[0]


def at_step(number: int, change):
    """A callback that changes something after a step."""

    def callback(pipeline, i, t, kwargs):
        if i == number:
            change(pipeline, kwargs)
        return kwargs

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
