"""What the measures compute, on pictures: nothing here draws, trains or knows a model.

Pictures are uint8 [P, 3, H, W], RGB.
"""

import math

import torch

from training.duplicates import small

NEAREST = 5
SATURATED = 0.3
HUE_TOLERANCE = 25.0
LEAST_COLOURED = 0.01  # of a picture's pixels: fewer have no colour to speak of
_BIN = 5.0  # degrees

# What a colour word asks for, in degrees as HSV has them: between the paints of recolour.py and the artwork that has
# the word in its name (its greens lie at 90 and 98, the paint at 119). Brown is a dark orange, and not asked for.
HUES = {"red": 0.0, "orange": 30.0, "yellow": 50.0, "green": 110.0, "blue": 210.0, "purple": 275.0, "pink": 338.0}


def concept_is_near(
    drawn: torch.Tensor,
    asked: list[frozenset[str]],
    gallery: torch.Tensor,
    shown: list[frozenset[str]],
    count: int = NEAREST,
) -> list[bool]:
    """For each drawn picture, whether one of the `count` nearest in the gallery shows one of the concepts asked for.

    `gallery` holds rows of `duplicates.small` [G, 3072], `shown` what each of them shows. Distance: mean squared error
    of 32x32 RGB.
    """
    distance = torch.cdist(small(drawn).to(gallery), gallery)
    nearest = distance.topk(min(count, len(shown)), dim=1, largest=False).indices.tolist()
    return [any(shown[n] & concepts for n in row) for row, concepts in zip(nearest, asked, strict=True)]


def hue_and_saturation(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hue in degrees, 0 to 360, and saturation in 0..1, both [P, H, W], as HSV defines them."""
    rgb = pictures.float() / 255
    top, low = rgb.amax(dim=1), rgb.amin(dim=1)
    spread = (top - low).clamp_min(1e-6)
    red, green, blue = rgb.unbind(dim=1)
    sector = torch.where(
        top == red,
        ((green - blue) / spread) % 6,
        torch.where(top == green, (blue - red) / spread + 2, (red - green) / spread + 4),
    )
    saturation = torch.where(top > 0, (top - low) / top.clamp_min(1e-6), 0.0)
    return sector * 60 % 360, saturation


def modal_hue(picture: torch.Tensor) -> float:
    """The hue, in degrees, that most pixels with a saturation above 0.3 have; NaN where a picture has too few.

    The mode of a histogram of 5 degrees a bin, each bin counted with its two neighbours, as the mean of those bins:
    where a shading straddles the edge of a bin, the mode doesn't jump.
    """
    hue, saturation = hue_and_saturation(picture[None])
    chosen = hue[saturation > SATURATED]
    if len(chosen) < LEAST_COLOURED * saturation.numel():
        return math.nan
    bins = (chosen / _BIN).long() % round(360 / _BIN)
    counts = torch.bincount(bins, minlength=round(360 / _BIN)).float()
    mode = int((counts.roll(1) + counts + counts.roll(-1)).argmax())
    middle = (mode + 0.5) * _BIN
    offsets = (chosen - middle + 180) % 360 - 180
    near = offsets[offsets.abs() <= 1.5 * _BIN]
    return (middle + near.mean().item()) % 360


def turn_between(one: float, other: float) -> float:
    """The angle between two hues, 0 to 180 degrees; NaN stays NaN."""
    return abs((one - other + 180) % 360 - 180)


def has_hue(picture: torch.Tensor, word: str) -> bool:
    """Whether the modal hue of a picture [3, H, W] lies within 25 degrees of what the colour word asks for."""
    return turn_between(modal_hue(picture), HUES[word]) <= HUE_TOLERANCE  # NaN is not


def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Root mean square difference [P] of pictures at 32x32 RGB in 0..1."""
    return (small(one) - small(other)).square().mean(dim=1).sqrt()
