"""The ControlNets of pipelines: optimized as the UNet is, while an optimized pipeline uses them; which, and why not.

A ControlNet's calls are captured by themselves, so several in a `MultiControlNetModel`, or one that is in it twice, are
so many playbacks. Their residuals are tensors of their own: the next playback leaves them alone, and diffusers adds
several ControlNets' up in place.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

from diffopt.unet import step_models
from diffopt.unet.parts import Parts


class OptimizedControlNets(Parts):
    """ControlNets that are optimized, each with the pipeline that it is for."""

    def __init__(self) -> None:
        super().__init__(step_models.take_off)

    def add(self, pipe: Any, device: torch.device, put_on: Callable[[torch.nn.Module, str], None]) -> None:
        """Optimize a pipeline's ControlNets, those that can be. Done again, it does what is not done yet.

        Args:
            pipe: a diffusers pipeline.
            device: where its UNet runs.
            put_on: does it, given a ControlNet and its name.
        """
        for name, net in fitting(pipe, device).items():
            self.note(net, pipe)  # first: what fails halfway is to be taken off, too
            put_on(net, name)

    def summary(self, pipelines: Iterable[Any], device: torch.device) -> list[dict[str, Any]]:
        """The ControlNets of pipelines whose UNet runs on `device`, once each, as plain data.

        Returns:
            For each its "name", what `step_models.summary` says of it, and "reasons" why it is not optimized as a
            whole.
        """
        found = {id(net): (name, net) for pipe in pipelines for name, net in of(pipe).items()}
        optimized = {id(net) for net, _ in self.pairs()}
        rows = []
        for name, net in found.values():
            if id(net) in optimized:
                rows.append({"name": name, "reasons": [], **step_models.summary(net)})
            else:
                why = reasons(net, device) or ["it is new here; optimize() again changes that"]
                nothing = {"fused": {}, "kept": [], "shared": []}
                rows.append({"name": name, "reasons": why, "step": None, "kept": "", "modules": nothing, "layers": []})
        return rows


def of(pipe: Any) -> dict[str, Any]:
    """The ControlNets of a pipeline by name, each once; of compiled ones, what was compiled."""
    whole = step_models.uncompiled(getattr(pipe, "controlnet", None))
    if type(whole) is not MultiControlNetModel:
        return {} if whole is None else {"controlnet": whole}
    found: dict[int, tuple[str, Any]] = {}
    for index, net in enumerate(map(step_models.uncompiled, whole.nets)):
        found.setdefault(id(net), (f"controlnet.nets.{index}", net))
    return dict(found.values())


def fitting(pipe: Any, device: torch.device) -> dict[str, torch.nn.Module]:
    """Those that can be optimized where the UNet runs on `device`."""
    return {name: net for name, net in of(pipe).items() if not reasons(net, device)}


def reasons(net: Any, device: torch.device) -> list[str]:
    """Why a ControlNet stays as it is, where the UNet runs on `device`; empty if it can be optimized."""
    if type(net) is not ControlNetModel:
        return [f"diffopt does not know {type(net).__name__}"]
    hooked = getattr(getattr(net, "_hf_hook", None), "execution_device", None)
    here = torch.device(next(net.parameters()).device if hooked is None else hooked)
    if here.type == device.type and (None in (here.index, device.index) or here.index == device.index):
        return []
    return [f"it is on {here}, the UNet on {device}"]
