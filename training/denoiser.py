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

from training import architecture, autoencoder, compose
from training.dataset import Dataset
from training.pace import Average, Mode, rate, say
from training.recipe import Recipe, loss_weights

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPTokenizer


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

    def __init__(self, data: Dataset, latents: torch.Tensor, batch: int, recipe: Recipe) -> None:
        """`latents` are [V, P, 4, H, W]: V views of each of the dataset's P pictures."""
        self.views, self.pictures = latents.shape[:2]
        self.latents = latents.flatten(0, 1).permute(0, 2, 3, 1).contiguous()  # [V * P, H, W, 4]
        self.tokens, self.empty, self.batch, self.recipe = data.tokens, data.empty, batch, recipe
        self.ladder = data.weight.cumsum(0)
        self.ladder[-1] = 1.0
        self.side = torch.arange(latents.shape[-1], device=latents.device)

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One batch: pictures by weight, any view of each, some of them shifted, a caption of each, some empty."""
        n, device, side = self.batch, self.latents.device, len(self.side)
        chosen = torch.searchsorted(self.ladder, torch.rand(n, device=device)).clamp_max(self.pictures - 1)
        view = chosen + self.pictures * torch.randint(0, self.views, (n,), device=device)
        shift = torch.randint(-1, 2, (n, 2), device=device)
        shift = shift * (torch.rand(n, 1, device=device) < self.recipe.shifted_share)
        rows = (self.side[None] - shift[:, :1]) % side
        columns = (self.side[None] - shift[:, 1:]) % side
        latents = self.latents[view[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        caption = torch.randint(0, self.tokens.shape[1], (n,), device=device)
        empty = torch.rand(n, 1, device=device) < self.recipe.empty_share
        return latents, torch.where(empty, self.empty, self.tokens[chosen, caption])


def encode_views(coder: "AutoencoderKL", rgb: torch.Tensor, views: int, seed: int = 5) -> torch.Tensor:
    """Latents, float32 [views, P, 4, H/4, W/4], of pictures, uint8 [P, 3, H, W]: as they are, then varied."""
    generator = torch.Generator().manual_seed(seed)
    rows = [autoencoder.encode(coder, rgb)]
    for _ in range(views - 1):
        parts = [autoencoder.encode(coder, compose.view(part, generator)) for part in rgb.split(1024)]
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def draw_timesteps(count: int, device: torch.device, uniform_share: float = 0.5) -> torch.Tensor:
    """Timesteps, int64 [count] in 0..999: a part uniform, the others logit-normal around the middle."""
    middle = torch.sigmoid(torch.randn(count, device=device))
    uniform = torch.rand(count, device=device)
    position = torch.where(torch.rand(count, device=device) < uniform_share, uniform, middle)
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
    recipe = batches.recipe
    signal = architecture.build_scheduler().alphas_cumprod.to(mode.device)
    weights = loss_weights(signal, recipe.min_snr)
    velocity_of = mode.compiled(model.forward)
    parameters = list(model.parameters())

    def step(copying: bool) -> None:
        latents, tokens = batches.draw()
        timesteps = draw_timesteps(len(latents), mode.device, recipe.uniform_share)
        alpha = signal[timesteps].sqrt()[:, None, None, None]
        sigma = (1 - signal[timesteps]).sqrt()[:, None, None, None]
        noise = torch.randn_like(latents)
        optimizer.zero_grad(set_to_none=True)
        with mode.autocast():
            velocity = velocity_of(tokens, alpha * latents + sigma * noise, timesteps)
        error = F.mse_loss(velocity.float(), alpha * noise - sigma * latents, reduction="none")
        loss = (error.mean(dim=(1, 2, 3)) * weights[timesteps]).mean()
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
    recipe: Recipe | None = None,
    run: int = 0,
    runs: int = 1,
) -> dict[str, float | None]:
    """Train until `deadline` (time.monotonic()); leaves the averaged weights in `model`.

    `latents` are [V, P, 4, H, W]. This is run number `run` (from 0) of `runs` that add up: one cosine goes through
    all of them, so that only the last one ends annealed. `checkpoint(average, steps)` is called every
    `checkpoint_seconds`. Returns metrics.
    """
    recipe = recipe or Recipe()
    fused = mode.device.type == "cuda"
    rates = torch.tensor(recipe.rate / recipe.warm_up_steps, device=mode.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rates, betas=(0.9, 0.99), weight_decay=0.01, fused=fused, capturable=fused
    )
    average = Average(model, recipe.average_decay, recipe.average_start)
    total = torch.zeros((), device=mode.device)
    step = make_step(model, Batches(data, latents, batch, recipe), optimizer, average, total, mode)
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
            progress = min(1.0, (time.monotonic() - started) / max(deadline - started, 1e-3))
            rates.fill_(rate(recipe.rate, steps, (run + progress) / runs, recipe.warm_up_steps))
        copying = steps < recipe.average_start
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
