"""What disturbs a measurement on a GPU: throttled clocks and other processes, looked for between samples."""

import torch

from diffopt.measure.environment import clocks, gpu_processes

_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown by the driver",
    0x40: "thermal slowdown by the hardware",
    0x80: "power brake",
}
"""NVML's clock event reasons that lower the clocks of a busy GPU (nvmlClocksEventReason...)."""


class Watch:
    """Looks at a GPU whenever it is asked to; sees nothing on a CPU or without NVML."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._looks = 0
        self._found: dict[str, int] = {}

    def look(self) -> None:
        """Remember what holds now."""
        now = clocks(self._device)
        if now is None:
            return
        self._looks += 1
        found = [f"clocks throttled ({reason})" for reason in throttling(now.throttle_reasons)]
        if (gpu_processes(self._device) or 0) > 1:
            found.append("another process on the GPU")
        for words in found:
            self._found[words] = self._found.get(words, 0) + 1

    def flags(self) -> tuple[str, ...]:
        """What was seen, each with how often."""
        return tuple(f"{words} at {times} of {self._looks} looks" for words, times in self._found.items())


def throttling(reasons: int | None) -> list[str]:
    """The bits of NVML's mask that mean lowered clocks, in words."""
    return [words for bit, words in _REASONS.items() if (reasons or 0) & bit]
