"""Pictures of one style that look the same: kept once, under all their names.

Twemoji draws one family for many names, and Noto has digits twice. Two captions for one picture are right; the same
picture several times would be seen too often, and the nearest-pictures measure would call a right answer wrong.
"""

import torch
import torch.nn.functional as F

from training.captions import Picture

NEAR = 0.02  # root mean square difference of 32x32 RGB in 0..1; the nearest pictures that differ lie at 0.025


def small(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures, uint8 [P, 3, H, W], as float rows [P, 3072] of 32x32 RGB in 0..1."""
    parts = [F.interpolate(part.float() / 255, (32, 32), mode="area").flatten(1) for part in pictures.split(1024)]
    return torch.cat(parts)


def merge(pictures: list[Picture], rgb: torch.Tensor, near: float = NEAR) -> list[int]:
    """Give the first of each set of look-alikes the others' names, and return the numbers of those to keep.

    `rgb` is uint8 [P, 3, H, W]. Every picture joins the first kept one of its style that is near, so a chain of
    small differences does not melt into one.
    """
    kept: list[int] = []
    for style in dict.fromkeys(picture.style for picture in pictures):
        numbers = [number for number, picture in enumerate(pictures) if picture.style == style]
        # The shorter name is the better one: "astronaut" before "man astronaut".
        numbers.sort(key=lambda number: (len(pictures[number].name.split()), number))
        rows = small(rgb[numbers])
        close = torch.cdist(rows, rows) <= near * rows.shape[1] ** 0.5
        mine: list[int] = []
        for place, number in enumerate(numbers):
            twin = next((p for p in mine if close[place, p]), None)
            if twin is None:
                mine.append(place)
            else:
                _take_names(pictures[numbers[twin]], pictures[number])
        kept += [numbers[place] for place in mine]
    return sorted(kept)


def _take_names(kept: Picture, dropped: Picture) -> None:
    for name in (dropped.name, dropped.label, *dropped.aliases):
        if name and name not in (kept.name, kept.label, *kept.aliases):
            kept.aliases.append(name)
    kept.weight = max(kept.weight, dropped.weight)
