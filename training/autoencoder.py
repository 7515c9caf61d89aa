"""Step 4: train the autoencoder, and fold the normalisation of its latents into its own weights."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from training import architecture
from training.pace import Average, Mode, rate, say

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

PEAK_RATE = 1e-3
WARM_UP_STEPS = 100
LATENT_NOISE = 0.03  # of the latents' standard deviation: the decoder learns to forgive the denoiser
KL_WEIGHT = 1e-6


def train(
    pictures: torch.Tensor, weight: torch.Tensor, *, seconds: float, batch: int, mode: Mode
) -> tuple["AutoencoderKL", dict[str, float]]:
    """Train on pictures (uint8 [P, 3, H, W]), drawn by weight [P], for a time after the first step.

    Returns the averaged model, its latents normalised, and its metrics: steps and PSNR in dB on 512 pictures.
    """
    device = pictures.device
    model = architecture.build_autoencoder().train()
    torch.nn.Module.to(model, device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    rates = torch.tensor(PEAK_RATE, device=device) if device.type == "cuda" else torch.tensor(PEAK_RATE)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rates, betas=(0.9, 0.99), weight_decay=1e-3, fused=fused, capturable=fused
    )
    average = Average(model, decay=0.995, start=50)
    objective = mode.compiled(_objective(model))
    ladder = weight.sqrt().cumsum(0)  # the rare pictures matter more here than in the denoiser
    steps, started, total = 0, time.monotonic(), torch.zeros((), device=device)
    while True:
        if steps == 3:  # what was compiled is compiled
            mode.wait()
            started = time.monotonic()
        elapsed = time.monotonic() - started if steps >= 3 else 0.0
        if elapsed >= seconds:
            break
        rates.fill_(rate(PEAK_RATE, steps, elapsed / seconds, WARM_UP_STEPS))
        chosen = torch.searchsorted(ladder, torch.rand(batch, device=device) * ladder[-1])
        x = pictures[chosen.clamp_max(len(pictures) - 1)].to(memory_format=torch.channels_last).float() / 127.5 - 1
        optimizer.zero_grad(set_to_none=True)
        with mode.autocast():
            loss = objective(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        average.update(steps)
        total += loss.detach()
        if steps % 100 == 0:
            say(f"autoencoder step {steps} loss {total.item() / 100:.4f} {steps / max(elapsed, 1e-3):.1f} steps/s")
            total.zero_()
    average.copy_to(model)
    model.eval()
    normalise(model, pictures, weight)
    psnr = reconstruction_psnr(model, pictures[:: max(1, len(pictures) // 512)])
    say(f"autoencoder done: {steps} steps, reconstruction {psnr:.2f} dB")
    return model, {"autoencoder_steps": steps, "autoencoder_psnr_db": round(psnr, 3)}


def _objective(model: "AutoencoderKL") -> Callable[[torch.Tensor], torch.Tensor]:
    """The loss of a batch [B, 3, H, W] in -1..1: L1, gradients at three scales, a tiny KL."""

    def objective(x: torch.Tensor) -> torch.Tensor:
        assert model.quant_conv is not None
        assert model.post_quant_conv is not None
        mean, log_variance = model.quant_conv(model.encoder(x)).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3)).mean()
        noise = (0.5 * log_variance).exp() * torch.randn_like(mean)
        noise = noise + LATENT_NOISE * mean.detach().std() * torch.randn_like(mean)
        y = model.decoder(model.post_quant_conv(mean + noise)).float()
        return F.l1_loss(y, x) + _gradient_loss(y, x) + KL_WEIGHT * kl

    return objective


def _gradient_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1 between the differences of neighbouring pixels, at full, half and quarter size: keeps edges sharp."""
    difference, loss = y - x, y.new_zeros(())
    for scale in (1, 2, 4):
        d = F.avg_pool2d(difference, scale) if scale > 1 else difference
        loss = loss + (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    return loss


@torch.no_grad()
def encode(model: "AutoencoderKL", pictures: torch.Tensor, chunk: int = 256) -> torch.Tensor:
    """Latents, float32 [P, 4, H/4, W/4], of pictures, uint8 [P, 3, H, W]: the mean, nothing drawn."""
    parts = [model.encode(part.float() / 127.5 - 1).latent_dist.mean for part in pictures.split(chunk)]  # pyright: ignore[reportAttributeAccessIssue]
    return torch.cat(parts)


@torch.no_grad()
def normalise(model: "AutoencoderKL", pictures: torch.Tensor, weight: torch.Tensor) -> None:
    """Give every latent channel mean 0 and standard deviation 1 over the training set, in place.

    The shift and scale go into the two 1x1 convolutions around the latents, so that scaling_factor is 1 and stock
    code needs to know nothing of them. What is reconstructed stays the same.
    """
    chosen = torch.multinomial(weight.cpu(), min(1024, 4 * len(pictures)), replacement=True).to(pictures.device)
    latents = encode(model, pictures[chosen])
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    before, after = model.quant_conv, model.post_quant_conv
    assert before is not None
    assert before.bias is not None
    assert after is not None
    assert after.bias is not None
    count = len(mean)
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(dim=1)
    after.weight *= deviation[None, :, None, None]
    before.weight[:count] /= deviation[:, None, None, None]
    before.bias[:count] = (before.bias[:count] - mean) / deviation
    before.bias[count:] -= 2 * deviation.log()  # the log-variances


@torch.no_grad()
def reconstruction_psnr(model: "AutoencoderKL", pictures: torch.Tensor) -> float:
    """Peak signal-to-noise ratio, dB, of encode and decode over pictures, uint8 [P, 3, H, W]."""
    errors = []
    for part in pictures.split(64):
        y = model.decode(encode(model, part), return_dict=False)[0].clamp(-1, 1)  # pyright: ignore[reportArgumentType]
        errors.append(((y - (part.float() / 127.5 - 1)) / 2).square().mean(dim=(1, 2, 3)))
    return -10 * torch.cat(errors).mean().log10().item()
