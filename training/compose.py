"""The pixels of examples: objects resized and placed on white, and every picture slightly shifted and scaled."""

import torch
import torch.nn.functional as F

# Where objects are put: the side of each and the places of their centres (down, across), all in shares of the picture.
LAYOUTS: dict[str, tuple[float, tuple[tuple[float, float], ...]]] = {
    "small": (0.45, ((0.5, 0.5),)),
    "big": (8 / 7, ((0.5, 0.5),)),  # fills the picture: render.py leaves a sixteenth on each side
    "two": (0.54, ((0.5, 0.26), (0.5, 0.74))),
    "three": (0.5, ((0.27, 0.5), (0.73, 0.25), (0.73, 0.75))),
    "four": (0.5, ((0.26, 0.26), (0.26, 0.74), (0.74, 0.26), (0.74, 0.74))),
    "beside": (0.54, ((0.5, 0.26), (0.5, 0.74))),
}

SMALLEST, LARGEST = 0.86, 1.06  # scales of a view
SHIFT = 1 / 32  # of the picture, to each side: four pixels of 128


def compose(layout: str, objects: list[torch.Tensor]) -> torch.Tensor:
    """Put objects, each uint8 [N, 3, H, W] on white, in their places: uint8 [N, 3, H, W].

    One object is repeated at all places of the layout; otherwise there is one for each place.
    """
    share, places = LAYOUTS[layout]
    if len(objects) == 1:
        objects = objects * len(places)
    height = objects[0].shape[-1]
    side = round(share * height)
    page = torch.full_like(objects[0], 255)
    for rgb, (down, across) in zip(objects, places, strict=True):
        mode = "bilinear"
        part = F.interpolate(rgb.float(), (side, side), mode=mode, antialias=True, align_corners=False)
        part = part.round().clamp(0, 255).to(torch.uint8)
        y, x = round(down * height - side / 2), round(across * height - side / 2)
        top, left = max(0, y), max(0, x)
        bottom, right = min(height, y + side), min(height, x + side)
        there = page[..., top:bottom, left:right]
        torch.minimum(there, part[..., top - y : bottom - y, left - x : right - x], out=there)
    return page


def view(rgb: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures, uint8 [P, 3, H, W] on white, each at a random scale and shift; what comes in at the edge is white."""
    count = len(rgb)
    draw = torch.rand(count, 3, generator=generator).to(rgb.device)
    scale = SMALLEST + (LARGEST - SMALLEST) * draw[:, 0]
    shift = (2 * draw[:, 1:] - 1) * 2 * SHIFT  # in the -1..1 of affine_grid
    zero = torch.zeros_like(scale)
    rows = [torch.stack([1 / scale, zero, shift[:, 0]], 1), torch.stack([zero, 1 / scale, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(rgb.shape), align_corners=False)
    ink = F.grid_sample(255.0 - rgb.float(), grid, padding_mode="zeros", align_corners=False)
    return (255.0 - ink).round().clamp(0, 255).to(torch.uint8)
