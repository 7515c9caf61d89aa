"""The recipe of the denoiser as data: what can be tried from the command line, and its defaults."""

from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Recipe:
    """How the denoiser is trained.

    Attributes:
        rate: peak learning rate.
        warm_up_steps: until the peak rate is reached, in every run (the optimizer starts anew in each).
        empty_share: of the captions are empty, for classifier-free guidance.
        shifted_share: of the latents are moved by one to some side; the margin around pictures is white.
        uniform_share: of the timesteps; the others lie around the middle, where shapes are decided.
        views: of each picture; the first as it is, the others slightly scaled and shifted (compose.py).
        average_decay: of the averaged weights, per step.
        average_start: steps during which the average is a copy; 0 in a run that goes on from an average.
        min_snr: gamma of min-SNR weighting (Hang et al., "Efficient Diffusion Training via Min-SNR Weighting
            Strategy", 2023, section 3.4), in the form for velocity; None is no weighting.
    """

    rate: float = 8e-4
    warm_up_steps: int = 400
    empty_share: float = 0.1
    shifted_share: float = 0.5
    uniform_share: float = 0.5
    views: int = 3
    average_decay: float = 0.9995
    average_start: int = 400
    min_snr: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def loss_weights(alphas_cumprod: torch.Tensor, min_snr: float | None) -> torch.Tensor:
    """The weight of each timestep's velocity loss, [T], with mean 1: min(SNR, gamma) / (SNR + 1), or ones."""
    if min_snr is None:
        return torch.ones_like(alphas_cumprod)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weights = snr.clamp_max(min_snr) / (snr + 1)
    return weights / weights.mean()
