"""Free-running pictures: how far whole pictures of one seed are apart, for us and for two of PyTorch's own backends.

Pictures diverge from rounding alone, so nothing here passes or fails but NaN: the step rule judges
(`diffopt.measure.teacher_forced`). What is shown is that the pictures differ as much as stock's do among themselves.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from diffopt.bench.report.extras import MissingExtraError, require
from diffopt.bench.step.free_running_record import FreeRunning, PictureDifferences
from diffopt.bench.step.picture_clock import quiet
from diffopt.measure.teacher_forced import Forward, UNetCall, using_stock

STOCK = "stock"


def free_running(
    stock: Any,
    optimized: Any,
    arguments: Callable[[int], dict[str, Any]],
    *,
    prompts: int,
    other: str | None,
    on_picture: Callable[[int], None],
) -> FreeRunning:
    """Make the pictures of each prompt and compare them.

    Args:
        stock, optimized: pipelines of equal weights.
        arguments: the keyword arguments of a pipeline call for the prompt of this number.
        other: the backend of the second stock run (`other_backend`).
        on_picture: told the number of prompts done.
    """
    ours = _Comparison(STOCK, "diffopt")
    theirs = None if other is None else _Comparison(STOCK, f"stock on {other}")
    steps = 0
    for number in range(prompts):
        steps = arguments(number)["num_inference_steps"]
        expected = _picture(stock, arguments(number))
        ours.add(expected, _picture(optimized, arguments(number)))
        if theirs is not None and other is not None:
            with using_stock(other):
                theirs.add(expected, _picture(stock, arguments(number)))
        on_picture(number + 1)
    return FreeRunning(
        prompts=prompts,
        steps=steps,
        ours=ours.differences(),
        stock=None if theirs is None else theirs.differences(),
        nonfinite_ours=ours.nonfinite_right,
        nonfinite_stock=ours.nonfinite_left,
    )


def other_backend(call: UNetCall, output: torch.Tensor, forwards: Mapping[str, Forward]) -> str | None:
    """The first of stock's backends whose bits are not those of stock as it came; None where there is none.

    Args:
        call, output: of stock as it came (`record_unet_calls`).
        forwards: stock on each backend by name (`stock_forwards`).
    """
    return next((name for name, forward in forwards.items() if not torch.equal(forward(call), output)), None)


def psnr_db(left: np.ndarray, right: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures in decibels: 10 log10(255² / mean squared error)."""
    error = float(np.mean((left.astype(np.float64) - right.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


class _Comparison:
    """Pairs of float pictures [H, W, 3] of 0 to 1, compared as they come."""

    def __init__(self, left: str, right: str) -> None:
        self._names = left, right
        self._psnr: list[float] = []
        self._ssim: list[float] = []
        self._maximum: list[int] = []
        self.nonfinite_left = self.nonfinite_right = 0
        self._similarity: Any = None
        with contextlib.suppress(MissingExtraError):
            self._similarity = require("skimage.metrics", "SSIM").structural_similarity

    def add(self, left: np.ndarray, right: np.ndarray) -> None:
        self.nonfinite_left += int((~np.isfinite(left)).sum())
        self.nonfinite_right += int((~np.isfinite(right)).sum())
        left, right = _quantised(left), _quantised(right)
        self._psnr.append(psnr_db(left, right))
        self._maximum.append(int(np.abs(left.astype(np.int16) - right.astype(np.int16)).max()))
        if self._similarity is not None:
            self._ssim.append(float(self._similarity(left, right, channel_axis=2, data_range=255)))

    def differences(self) -> PictureDifferences:
        left, right = self._names
        ssim = self._ssim if self._similarity is not None else None
        return PictureDifferences(left=left, right=right, psnr_db=self._psnr, ssim=ssim, max_difference=self._maximum)


def _picture(pipe: Any, arguments: dict[str, Any]) -> np.ndarray:
    """The (first) picture of one call, [H, W, 3] of 0 to 1."""
    with quiet(pipe):
        return pipe(**arguments, output_type="np").images[0]


def _quantised(picture: np.ndarray) -> np.ndarray:
    """As diffusers rounds to 8 bits; NaN is black."""
    return (np.nan_to_num(picture) * 255).round().astype(np.uint8)
