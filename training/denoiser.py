"""Step 5: train the UNet and the text encoder together on latents, predicting velocity.

v-prediction: Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022, section 4.
Everything a step needs is drawn on the device, so that a step can be captured as one CUDA graph.
"""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from training import architecture
from training.dataset import Dataset
from training.pace import Average, Mode, rate, say

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

PEAK_RATE = 8e-4
WARM_UP_STEPS = 400
EMPTY_SHARE = 0.1  # of the captions, for classifier-free guidance
SHIFTED_SHARE = 0.5  # of the pictures are moved by one latent to some side; the margin around them is white
UNIFORM_SHARE = 0.5  # of the timesteps; the others lie around the middle, where shapes are decided
AVERAGE_DECAY = 0.999
AVERAGE_START = 400


class Denoiser(torch.nn.Module):
    """Text encoder and UNet as one module: token ids and noisy latents in, velocity out."""

    def __init__(self, words: "CLIPTokenizer") -> None:
        super().__init__()
        self.unet = architecture.build_unet()
        self.text_encoder = architecture.build_text_encoder(words)

    def forward(self, tokens: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [B, 77], noisy latents [B, 4, H, W], timesteps int64 [B] to velocity [B, 4, H, W]."""
        text = self.text_encoder(input_ids=tokens).last_hidden_state
        return self.unet(noisy, timesteps, text, return_dict=False)[0]


class Batches:
    """Draws training batches on the device: latents [B, 4, H, W] (channels last in memory) and tokens [B, 77]."""

    def __init__(self, data: Dataset, latents: torch.Tensor, batch: int) -> None:
        self.latents = latents.permute(0, 2, 3, 1).contiguous()  # [P, H, W, 4]
        self.tokens, self.empty, self.batch = data.tokens, data.empty, batch
        self.ladder = data.weight.cumsum(0)
        self.ladder[-1] = 1.0
        self.side = torch.arange(latents.shape[-1], device=latents.device)

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One batch: pictures by weight, half of them shifted, a caption of each, one in ten empty."""
        n, device, side = self.batch, self.latents.device, len(self.side)
        chosen = torch.searchsorted(self.ladder, torch.rand(n, device=device)).clamp_max(len(self.latents) - 1)
        shift = torch.randint(-1, 2, (n, 2), device=device)
        shift = shift * (torch.rand(n, 1, device=device) < SHIFTED_SHARE)
        rows = (self.side[None] - shift[:, :1]) % side
        columns = (self.side[None] - shift[:, 1:]) % side
        latents = self.latents[chosen[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        caption = torch.randint(0, self.tokens.shape[1], (n,), device=device)
        empty = torch.rand(n, 1, device=device) < EMPTY_SHARE
        return latents, torch.where(empty, self.empty, self.tokens[chosen, caption])


def draw_timesteps(count: int, device: torch.device) -> torch.Tensor:
    """Timesteps, int64 [count] in 0..999: a part uniform, the others logit-normal around the middle."""
    middle = torch.sigmoid(torch.randn(count, device=device))
    uniform = torch.rand(count, device=device)
    position = torch.where(torch.rand(count, device=device) < UNIFORM_SHARE, uniform, middle)
    return (position * 1000).long().clamp(0, 999)


def make_step(
    model: Denoiser,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    average: Average,
    total: torch.Tensor,
    mode: Mode,
) -> Callable[[bool], None]:
    """A training step that adds its loss to `total`; its argument says whether the average is still a copy."""
    signal = architecture.build_scheduler().alphas_cumprod.to(mode.device)
    velocity_of = mode.compiled(model.forward)
    parameters = list(model.parameters())

    def step(copying: bool) -> None:
        latents, tokens = batches.draw()
        timesteps = draw_timesteps(len(latents), mode.device)
        alpha = signal[timesteps].sqrt()[:, None, None, None]
        sigma = (1 - signal[timesteps]).sqrt()[:, None, None, None]
        noise = torch.randn_like(latents)
        optimizer.zero_grad(set_to_none=True)
        with mode.autocast():
            velocity = velocity_of(tokens, alpha * latents + sigma * noise, timesteps)
        loss = F.mse_loss(velocity.float(), alpha * noise - sigma * latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        average.update(average.start if copying else average.start + 1)
        total.add_(loss.detach())

    return step


def capture(step: Callable[[bool], None], mode: Mode) -> Callable[[bool], None]:
    """The step as one CUDA graph, captured after a few warm-up steps; in other modes the step itself.

    The captured step keeps the average moving; while it is to be a copy, the caller copies.
    """
    if mode.name != "graph":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(6):
            step(True)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step(False)
    torch.cuda.synchronize()
    say("one training step is captured as a CUDA graph")

    def replay(copying: bool) -> None:
        graph.replay()

    replay.captured = step  # pyright: ignore[reportFunctionMemberAccess]  (keeps what the graph reads from being freed)
    return replay


def train(
    data: Dataset,
    latents: torch.Tensor,
    model: Denoiser,
    *,
    deadline: float,
    batch: int,
    mode: Mode,
    checkpoint: Callable[[Average, int], None],
    checkpoint_seconds: float = 90.0,
    max_steps: int | None = None,
) -> dict[str, float | None]:
    """Train until `deadline` (time.monotonic()), annealed exactly then; leaves the averaged weights in `model`.

    `checkpoint(average, steps)` is called every `checkpoint_seconds`. Returns metrics.
    """
    fused = mode.device.type == "cuda"
    rates = torch.tensor(PEAK_RATE / WARM_UP_STEPS, device=mode.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rates, betas=(0.9, 0.99), weight_decay=0.01, fused=fused, capturable=fused
    )
    average = Average(model, AVERAGE_DECAY, AVERAGE_START)
    total = torch.zeros((), device=mode.device)
    step = make_step(model, Batches(data, latents, batch), optimizer, average, total, mode)
    say("compiling and warming up the denoiser's step")
    step(True)
    mode.wait()
    say("the first step is done")
    step = capture(step, mode)
    total.zero_()
    started = saved = said = time.monotonic()
    steps, said_steps, last = 0, 0, math.nan
    while time.monotonic() < deadline and steps != max_steps:
        if steps % 8 == 0:
            progress = (time.monotonic() - started) / max(deadline - started, 1e-3)
            rates.fill_(rate(PEAK_RATE, steps, progress, WARM_UP_STEPS))
        copying = steps <= AVERAGE_START
        step(copying)
        if copying and mode.name == "graph":
            average.update(0)
        steps += 1
        if steps % 16 == 0:
            mode.wait()  # else the queue runs ahead of the clock
        now = time.monotonic()
        if now - said >= 10:
            last = total.item() / (steps - said_steps)
            if not math.isfinite(last):
                raise FloatingPointError(f"the loss is {last} at step {steps}")  # before it reaches a checkpoint
            say(f"denoiser step {steps} loss {last:.4f} {(steps - said_steps) / (now - said):.1f} steps/s")
            total.zero_()
            said, said_steps = now, steps
        if now - saved >= checkpoint_seconds:
            checkpoint(average, steps)
            saved = time.monotonic()
    mode.wait()
    seconds = round(time.monotonic() - started, 1)
    final_loss = round(last, 5) if math.isfinite(last) else None
    average.copy_to(model)
    say(f"denoiser done: {steps} steps in {seconds} s, loss {final_loss}")
    return {"denoiser_steps": steps, "denoiser_seconds": seconds, "denoiser_loss": final_loss, "batch": batch}
