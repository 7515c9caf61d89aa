"""Colours: which one a picture has, and the same picture in another one.

Everything happens in OKLab (Björn Ottosson, "A perceptual color space for image processing", 2020), where hue,
chroma and lightness can be moved apart from each other, so that a repainted yellow is blue and not a dark olive.
"""

import math
from dataclasses import dataclass

import torch

# Typical values in OKLab: lightness, chroma, hue in degrees.
PAINTS: dict[str, tuple[float, float, float]] = {
    "red": (0.60, 0.22, 27.0),
    "orange": (0.75, 0.17, 60.0),
    "yellow": (0.88, 0.17, 95.0),
    "green": (0.68, 0.18, 143.0),
    "blue": (0.60, 0.17, 252.0),
    "purple": (0.56, 0.19, 308.0),
    "pink": (0.76, 0.15, 355.0),
    "brown": (0.48, 0.08, 52.0),
}

_CHROMATIC = 0.05  # less chroma than this is white, grey or black
_SAME_HUE = math.radians(40)

_TO_LMS = ((0.4122214708, 0.5363325363, 0.0514459929), (0.2119034982, 0.6806995451, 0.1073969566),
           (0.0883024619, 0.2817188376, 0.6299787005))  # fmt: skip
_TO_LAB = ((0.2104542553, 0.7936177850, -0.0040720468), (1.9779984951, -2.4285922050, 0.4505937099),
           (0.0259040371, 0.7827717662, -0.8086757660))  # fmt: skip


def _mix(matrix: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ij,...jhw->...ihw", matrix.to(picture), picture)


def to_oklab(rgb: torch.Tensor) -> torch.Tensor:
    """sRGB [..., 3, H, W] in 0..1 to OKLab of the same shape."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)
    return _mix(torch.tensor(_TO_LAB), _mix(torch.tensor(_TO_LMS), linear).clamp_min(0) ** (1 / 3))


def from_oklab(lab: torch.Tensor) -> torch.Tensor:
    """OKLab [..., 3, H, W] to sRGB in 0..1, clipped to what sRGB can show."""
    back_to_lms = torch.linalg.inv(torch.tensor(_TO_LAB, dtype=torch.float64)).float()
    back_to_rgb = torch.linalg.inv(torch.tensor(_TO_LMS, dtype=torch.float64)).float()
    linear = _mix(back_to_rgb, _mix(back_to_lms, lab) ** 3).clamp(0, 1)
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp_min(1e-8) ** (1 / 2.4) - 0.055)


def _dominant(lab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels of the dominant hue [B, 1, H, W] and the mean OKLab of those pixels [B, 3]."""
    chroma, hue = lab[:, 1:].norm(dim=1), torch.atan2(lab[:, 2], lab[:, 1])
    weight = torch.where(chroma > _CHROMATIC, chroma, 0.0)
    bins = torch.linspace(-math.pi, math.pi, 37, device=lab.device)[:-1]
    near = torch.stack([(_turn(hue - b).abs() < _SAME_HUE) * weight for b in bins], dim=1)  # [B, 36, H, W]
    mode = bins[near.sum(dim=(2, 3)).argmax(dim=1)]
    pixels = ((_turn(hue - mode[:, None, None]).abs() < _SAME_HUE) & (chroma > _CHROMATIC))[:, None]
    count = pixels.sum(dim=(1, 2, 3)).clamp_min(1)
    return pixels, (lab * pixels).sum(dim=(2, 3)) / count[:, None]


def _turn(angle: torch.Tensor) -> torch.Tensor:
    return (angle + math.pi) % (2 * math.pi) - math.pi


def colour_words(rgb: torch.Tensor) -> list[str]:
    """The colour word of each picture [B, 3, H, W] in 0..1, or an empty string where no one colour rules."""
    lab = to_oklab(rgb)
    pixels, mean = _dominant(lab)
    chromatic = (lab[:, 1:].norm(dim=1, keepdim=True) > _CHROMATIC).sum(dim=(1, 2, 3))
    inked = ((rgb < 0.97).any(dim=1)).sum(dim=(1, 2)).clamp_min(1)
    ruled = pixels.sum(dim=(1, 2, 3))
    rules = (ruled > 0.75 * chromatic) & (ruled > 0.5 * inked)
    paints = torch.tensor([_lab_of(word) for word in PAINTS], device=rgb.device)
    nearest = torch.cdist(mean * mean.new_tensor([0.5, 1, 1]), paints * mean.new_tensor([0.5, 1, 1])).argmin(dim=1)
    words = list(PAINTS)
    return [words[n] if r else "" for n, r in zip(nearest.tolist(), rules.tolist(), strict=True)]


def _lab_of(word: str) -> tuple[float, float, float]:
    lightness, chroma, hue = PAINTS[word]
    return lightness, chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))


@dataclass(frozen=True)
class Inks:
    """Pictures taken apart: OKLab [B, 3, H, W], the pixels of the dominant hue [B, 1, H, W], their mean [B, 3]."""

    lab: torch.Tensor
    pixels: torch.Tensor
    mean: torch.Tensor

    def of(self, rows: list[int]) -> "Inks":
        """The same for some of the pictures."""
        return Inks(self.lab[rows], self.pixels[rows], self.mean[rows])


def take_apart(rgb: torch.Tensor) -> Inks:
    """What repainting needs to know of pictures [B, 3, H, W] in 0..1, whatever the new colour."""
    lab = to_oklab(rgb)
    return Inks(lab, *_dominant(lab))


def repaint(rgb: torch.Tensor, word: str, inks: Inks | None = None) -> torch.Tensor:
    """Paint the dominant colour of pictures [B, 3, H, W] in 0..1 in another one; shades and other hues stay."""
    inks = inks or take_apart(rgb)
    lab, pixels, mean = inks.lab, inks.pixels, inks.mean
    lightness, chroma, hue = PAINTS[word]
    own_chroma = lab[:, 1:].norm(dim=1)
    own_mean = mean[:, 1:].norm(dim=1).clamp_min(_CHROMATIC)
    turn = math.radians(hue) - torch.atan2(mean[:, 2], mean[:, 1])
    # Differences of hue inside the picture are kept at a third: a red with an orange shade becomes one blue.
    own_hue = torch.atan2(lab[:, 2], lab[:, 1])
    new_hue = math.radians(hue) + _turn(own_hue + turn[:, None, None] - math.radians(hue)) / 3
    new_chroma = own_chroma * (chroma / own_mean)[:, None, None]
    # White highlights keep their lightness, full colours take the new one's.
    strength = (own_chroma / own_mean[:, None, None]).clamp(0, 1)
    new_lightness = (lab[:, 0] + strength * (lightness - mean[:, 0])[:, None, None]).clamp(0, 1)
    painted = torch.stack([new_lightness, new_chroma * new_hue.cos(), new_chroma * new_hue.sin()], dim=1)
    return torch.where(pixels, from_oklab(painted), rgb)
