"""`optimize(pipe)` and the handle it returns: report, plan, restore."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from diffopt.attention import attached, backends, layers
from diffopt.attention.backends import AUTO, Backend
from diffopt.attention.layers import AttentionLayer
from diffopt.attention.machine import machine
from diffopt.attention.plan import Plan
from diffopt.attention.tuning import use_tuned
from diffopt.errors import InputError, OptimizeError
from diffopt.gpus import OWN
from diffopt.measure.profile import ForwardProfile, on_meta, profile_forward
from diffopt.measure.teacher_forced import record_unet_calls
from diffopt.unet import controlnets, decoders, float16_decode, fused, graphs, schedules, step_models
from diffopt.unet.capturers import CudaCapturer
from diffopt.unet.graphs import CapturedCalls

_handles: "weakref.WeakKeyDictionary[torch.nn.Module, Handle]" = weakref.WeakKeyDictionary()


class Handle:
    """What `optimize` did to a UNet and to what else its pipelines use. Pipelines that share the UNet share the handle.

    Attributes:
        attention: what was asked for: `auto` or a backend's name.
        plan: which backend serves which shape, filled in as the pipeline runs; `plan.save(path)` keeps it.
        capture: whether calls of the UNet and of ControlNets may be captured as CUDA graphs.
        decode: how VAEs decode, one of `float16_decode.MODES`.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        attention: str | Backend,
        plan: Plan | None,
        device: torch.device,
        capture: bool = True,
        decode: str = float16_decode.STOCK,
    ) -> None:
        if plan is None:
            name = attention if isinstance(attention, str) else attention.name
            plan = Plan(name, machine(device))
        self.attention = plan.attention
        self.plan = plan
        self.capture = capture
        self.decode = decode
        self._unet = weakref.ref(unet)
        self._device = device
        self._candidates = _candidates(attention, plan, device)
        self._pipelines: list[weakref.ref[Any]] = []
        self._unfused: list[str] = []
        self._fed = schedules.Fed()
        self._profile: ForwardProfile | None = None
        self._decoders = decoders.FusedDecoders()
        self._in_float16 = float16_decode.Float16Decoders()
        self._controlnets = controlnets.OptimizedControlNets()

    @property
    def active(self) -> bool:
        """Whether the UNet still exists and this handle optimizes it."""
        unet = self._unet()
        return unet is not None and _handles.get(unet) is self

    def report(self) -> str:
        """What runs in each layer, how often and why; one line per layer and shape, ready to print."""
        summary = self.summary()
        lines = [f"attention: {summary['attention']} on {summary['device']}"]
        lines += [f"note: {note}" for note in summary["notes"]]
        lines += [f"note: {calls} calls fell back: {reason}" for reason, calls in summary["fallbacks"].items()]
        if self._profile is not None:
            lines.append(self._profile.words(summary["profile"]["floor_us"]))
        lines += _step_lines(summary["step"], "UNet") + _module_lines(summary["modules"])
        lines += [f"VAE: {line}" for row in summary["vae"] for line in _vae_lines(row)]
        for net in summary["controlnets"]:
            found = _step_lines(net["step"], "ControlNet") + _module_lines(net["modules"])
            lines += [f"{net['name']}: {line}" for line in found]
        rows = [*summary["layers"], *_layers_of(summary["controlnets"])]
        return "\n".join(lines + _layer_lines(rows))

    def summary(self) -> dict[str, Any]:
        """The report as plain data.

        attention, device, notes; "fallbacks": calls that did not get the backend that comes first, by reason; "step":
        captured and uncaptured UNet calls; "profile": where the time of one goes, once `profile` has looked;
        "modules": what of the UNet is fused; "vae": the same of its pipelines' VAEs (`decoders.summary`), with
        `decode="float16"` how they decode, too ("decode", `float16_decode.summary`); "layers": what is on the UNet now
        and what ran, playbacks of captured calls included; "controlnets": all of that of its pipelines' ControlNets
        (`OptimizedControlNets.summary`).
        """
        unet = step_models.summary(self._require_unet())
        nets = self._controlnets.summary(self._live_pipelines(), self._device)
        rows = [*unet["layers"], *_layers_of(nets)]
        return {
            "attention": self.attention,
            "device": self.plan.made_for["device"],
            "notes": self._notes(rows, unet["kept"], nets),
            "fallbacks": attached.fallbacks(rows),
            "step": unet["step"],
            "profile": self._profile_data(),
            "modules": unet["modules"],
            "vae": self._vaes(),
            "controlnets": nets,
            "layers": unet["layers"],
        }

    def profile(self, run: Callable[[], object]) -> dict[str, Any] | None:
        """Where the time of a UNet call goes on the GPU, by kind of work; in `report()` and `summary()` from then on.

        Looks at the call in the middle of a run, alone: what the steps of a run share is computed in it, too.

        Args:
            run: makes a picture with an optimized pipeline: `lambda: pipe("a red apple", num_inference_steps=4)`.

        Returns:
            Per UNet call: "microseconds" of GPU time by kind, "total_us", "launches", "flops" of a stock one (a
            multiply-add is two; None where they can't be counted), "floor_us" that these take at the datasheet's
            peak (None for a GPU not in configs/gpus), "why" it went wrong. None on a CPU.

        Raises:
            OptimizeError: the handle is restored, or the run makes no UNet call.
        """
        unet = self._require_unet()
        if not self.active:
            raise OptimizeError("profile: the handle is restored, there is nothing of diffopt to look at")
        calls, _ = record_unet_calls(unet, run)
        if not calls:
            raise OptimizeError("profile: the run makes no call of the UNet that this handle optimizes")
        call = calls[len(calls) // 2]
        self._profile = profile_forward(call, unet, on_meta(unet, call))
        return self._profile_data()

    def restore(self) -> None:
        """Put the exact former processors, forwards and layouts back, where ours are still in place.

        While other pipelines that share the UNet were optimized too, this only takes one of them off the count; a VAE,
        ControlNet or scheduler that another optimized pipeline uses stays, too. Calling it once more than needed does
        nothing.
        """
        self._release(None)

    def __repr__(self) -> str:
        state = "active" if self.active else "restored"
        return f"<diffopt handle: attention {self.attention!r}, {state}>"

    def _release(self, pipe: Any | None) -> None:
        alive = [reference for reference in self._pipelines if reference() is not None]
        leaving = next((reference for reference in alive if reference() is pipe), None) or (alive or [None])[-1]
        self._pipelines = [reference for reference in alive if reference is not leaving]
        kept, handles = self._live_pipelines(), [self, *_handles.values()]
        self._fed.keep_only(kept, [handle._fed for handle in handles])
        self._decoders.keep_only(kept, [handle._decoders for handle in handles])
        self._in_float16.keep_only(kept, [handle._in_float16 for handle in handles])
        self._controlnets.keep_only(kept, [handle._controlnets for handle in handles])
        unet = self._unet()
        if unet is None or not self.active or self._pipelines:
            return
        step_models.take_off(unet)
        del _handles[unet]

    def keep_timesteps(self, pipe: Any) -> None:
        """Keep the timesteps of a pipeline's scheduler on the CPU, where that saves waiting for the GPU and is safe.
        The UNet and ControlNets then know which timesteps come next, and embed many at once.

        `optimize` does it; call it after another scheduler was put into an optimized pipeline.
        """
        if self._feeds_from_cpu():
            self._fed.add(pipe)
            if schedules.is_on(getattr(pipe, "scheduler", None)):
                for model in (self._unet(), *controlnets.of(pipe).values()):
                    graphs.expect(model, pipe.scheduler)

    def _move(self, device: torch.device, attention: str | Backend) -> None:
        """Its pipelines were moved: what was chosen for another device means nothing here."""
        if machine(device) != self.plan.made_for:
            self.plan.choices.clear()
        asked = attention if isinstance(attention, Backend) else self.attention
        self._candidates = _candidates(asked, self.plan, device)
        self.plan.made_for, self._device = machine(device), device

    def _feeds_from_cpu(self) -> bool:
        return self.active and self.capture and not schedules.device_reasons(self._device)

    def _has(self, pipe: Any) -> bool:
        return any(reference() is pipe for reference in self._pipelines)

    def _attach(self, unet: torch.nn.Module, pipe: Any) -> None:
        """Put on what is not there yet; processors that diffusers replaced are replaced again.

        Where that fails, a pipeline that is new here is left as it was.
        """
        was_in = self._has(pipe)
        if not was_in:
            self._pipelines.append(weakref.ref(pipe))
        _handles[unet] = self
        try:
            self._put_on_parts(unet, pipe)
        except BaseException:
            if not was_in:
                self._release(pipe)
            raise

    def _put_on_parts(self, unet: torch.nn.Module, pipe: Any) -> None:
        """Optimize the UNet and what else the pipeline uses."""
        self._unfused = backends.step_kernel_reasons(self._device)
        self._put_on(unet)
        self._controlnets.add(pipe, self._device, lambda net, name: self._put_on(net, f"{name}."))
        if not self._unfused:
            self._decoders.add(pipe, self._device)
        if self.decode == float16_decode.FLOAT16:
            self._in_float16.add(pipe)  # a copy of a decoder, fused as that is
        self.keep_timesteps(pipe)

    def _put_on(self, model: torch.nn.Module, prefix: str = "") -> None:
        """Optimize the UNet or a ControlNet, whose layers' names begin with `prefix`."""
        attached.put_on(model, self._candidates, self.plan, prefix)
        if not self._unfused:
            fused.put_on(model)
        if self.capture and getattr(model, graphs.ATTRIBUTE, None) is None:
            graphs.put_on(model, CapturedCalls(CudaCapturer(), fused.OURS))

    def _live_pipelines(self) -> list[Any]:
        return [pipe for reference in self._pipelines if (pipe := reference()) is not None]

    def _vaes(self) -> list[dict[str, Any]]:
        rows = decoders.summary(self._live_pipelines(), self._device, self._unfused)
        if self.decode == float16_decode.FLOAT16:
            how = float16_decode.summary(self._live_pipelines())
            rows = [{**row, "decode": decode} for row, decode in zip(rows, how, strict=True)]
        return rows

    def _profile_data(self) -> dict[str, Any] | None:
        if self._profile is None:
            return None
        dtype = str(self._require_unet().dtype).removeprefix("torch.")
        return self._profile.data(self._profile.floor_us(self.plan.made_for["device"], dtype))

    def _require_unet(self) -> torch.nn.Module:
        unet = self._unet()
        if unet is None:
            raise OptimizeError("the optimized UNet no longer exists")
        return unet

    def _notes(self, rows: list[dict[str, Any]], kept_forward: str, nets: list[dict[str, Any]]) -> list[str]:
        notes = [] if self.active else ["restored: diffopt is off"]
        active = _AttentionBackendRegistry.get_active_backend()[0]
        if active != AttentionBackendName.NATIVE:
            name = AttentionBackendName(active).value
            notes.append(f"diffusers' attention backend is set to {name!r}, which has no effect on this UNet")
        users = len(self._live_pipelines())
        if users > 1:
            notes.append(f"shared by {users} pipelines; restore() counts them down")
        for pipe in self._live_pipelines():
            if _unet_of(pipe) is not self._unet():
                notes.append(f"{type(pipe).__name__} has another UNet now; optimize() again optimizes that one")
        if self.attention == AUTO:
            ran = any(run["backend"] == OWN for row in rows for run in row["runs"])
            reasons = [] if ran else backends.own_kernel_reasons(self._device)
            if reasons:
                notes.append(f"diffopt's kernel is off: {', '.join(reasons)}; PyTorch's SDPA runs")
        if self._unfused and self.active:
            notes.append(f"blocks are not fused: {', '.join(self._unfused)}; diffusers' own run")
        vaes = {id(vae): vae for pipe in self._live_pipelines() if (vae := getattr(pipe, "vae", None)) is not None}
        tiled = {type(vae).__name__ for vae in vaes.values() if getattr(vae, "use_tiling", False)}
        inexact = "by design, pictures larger than one tile are not exact"
        notes += [f"{name} decodes in tiles, as asked for: {inexact}" for name in sorted(tiled)]
        for row in () if self._unfused else self._vaes():
            if row["reasons"]:
                notes.append(f"the decoder of {row['kind']} is not fused: {', '.join(row['reasons'])}")
        if self.capture and self.active:
            notes += [f"UNet calls are not captured: {kept_forward}"] if kept_forward else []
            notes += [f"{net['name']}: calls are not captured: {net['kept']}" for net in nets if net["kept"]]
        notes += [f"{net['name']} is not optimized: {', '.join(net['reasons'])}" for net in nets if net["reasons"]]
        if self._feeds_from_cpu():
            notes += schedules.notes(self._live_pipelines())
        if self._device.type == "cuda" and self.attention in (AUTO, OWN):
            notes.append(f"tuned: {use_tuned(self._device).words}")
        return notes


def optimize(
    pipe: Any,
    *,
    attention: str | Backend = AUTO,
    plan: Plan | str | Path | None = None,
    capture: bool | None = None,
    decode: str | None = None,
) -> Handle:
    """Make a diffusers pipeline's denoising steps and the decoding of its pictures faster; they stay the same.

    Replaces the attention of its UNet and ControlNets and, on a CUDA GPU, puts the blocks around it and the VAE's
    decoder on fused kernels and channels-last weights, captures calls of the UNet and of each ControlNet as graphs, and
    keeps the scheduler's timesteps on the CPU.

    Works on this pipeline's modules only and changes no global setting. The same arguments again return the same
    handle, and put processors back that diffusers replaced meanwhile (IP-Adapters, slicing, fused projections).

    Args:
        pipe: a diffusers pipeline with a `unet`.
        attention: `auto`, or a backend by name (`diffopt doctor` lists them) to be used everywhere or refused.
        plan: choices from an earlier run: a `Plan`, or the path of a saved one. Only with `attention="auto"` or the
            attention it was made with.
        capture: whether to capture calls of the UNet and of ControlNets as CUDA graphs, where that is safe; by default
            it is done. What can't be captured runs as it comes, and the report says why.
        decode: "stock" (the default), or "float16": where stock decodes pictures in float32 because float16 overflows
            (SDXL), decode them in float16, scaled so that nothing can overflow; pictures then differ by rounding. What
            the proof does not cover is decoded as stock does, and the report says why (`diffopt.unet.float16_decode`).

    Raises:
        InputError: an unknown backend or `decode`, or an argument of another type.
        BackendError: a backend asked for by name can't serve this pipeline; lists every reason.
        OptimizeError: no UNet, other arguments than last time (or than for another pipeline that has the same
            ControlNet or VAE), or a plan that does not fit.
    """
    _check_arguments(attention, plan, capture, decode)
    unet = _unet_of(pipe)
    if not isinstance(unet, torch.nn.Module):
        raise OptimizeError(f"{type(pipe).__name__} has no UNet; diffopt optimizes Stable Diffusion 1.x, 2.x and XL")
    if not layers.attention_modules(unet):
        raise OptimizeError(f"{type(unet).__name__} has no attention layers that diffopt knows")
    handle = _handles.get(unet)
    device = _device(pipe, unet)
    models = {"": unet, **{f"{name}.": net for name, net in controlnets.fitting(pipe, device).items()}}
    plan = _read_plan(plan, attention, device)
    if plan is not None:
        _check_plan_shapes(plan, models)
    if handle is None:
        name = attention if plan is None else plan.attention
        handle = Handle(unet, name, plan, device, capture is not False, decode or float16_decode.STOCK)
    else:
        name = attention if isinstance(attention, str) else attention.name
        if handle.attention != (name if plan is None else plan.attention):
            raise OptimizeError(
                f"already optimized with attention={handle.attention!r}; call restore() on its handle first"
            )
        if plan is not None and not handle.plan.follows(plan):
            raise OptimizeError(
                "already optimized with other choices than this plan's; call restore() on its handle first"
            )
        if capture is not None and capture != handle.capture:
            raise OptimizeError(f"already optimized with capture={handle.capture}; call restore() on its handle first")
        if decode is not None and decode != handle.decode:
            raise OptimizeError(f"already optimized with decode={handle.decode!r}; call restore() on its handle first")
        if device != handle._device:
            handle._move(device, attention)
    _check_forced(handle, models)
    _check_shared(handle, models)
    _check_decode(handle, pipe)
    handle._attach(unet, pipe)
    return handle


@contextlib.contextmanager
def optimized(
    pipe: Any,
    *,
    attention: str | Backend = AUTO,
    plan: Plan | str | Path | None = None,
    capture: bool | None = None,
    decode: str | None = None,
) -> Iterator[Handle]:
    """`optimize` for the length of a `with` block; restores on the way out, exception or not.

    A pipeline that was optimized before the block stays optimized after it. Arguments and errors as `optimize`.
    """
    unet = _unet_of(pipe)
    before = _handles.get(unet) if isinstance(unet, torch.nn.Module) else None
    was_in = before is not None and before._has(pipe)
    handle = optimize(pipe, attention=attention, plan=plan, capture=capture, decode=decode)
    try:
        yield handle
    finally:
        if not was_in:
            handle._release(pipe)


def _unet_of(pipe: Any) -> Any:
    """A pipeline's UNet, the one inside where it was compiled; None where there is none."""
    return step_models.uncompiled(getattr(pipe, "unet", None))


def _step_lines(step: dict[str, Any] | None, model: str) -> list[str]:
    if step is None:
        return []
    lines = [f"captured: {bucket['inputs']}, {bucket['replays']} replays" for bucket in step["buckets"]]
    if step["prologues"]:
        lines.append(f"captured apart: keys and values of the prompt, {step['prologues']} replays")
    if step["tables"]:
        lines.append(f"captured apart: time embeddings, {step['tables']} replays")
    if step["sums"]:
        lines.append(f"captured apart: summed weights, {step['sums']} replays")
    return lines + [f"not captured: {row['calls']} {model} calls: {row['reason']}" for row in step["uncaptured"]]


def _layers_of(nets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of ControlNets' layers, named in full."""
    return [{**row, "name": f"{net['name']}.{row['name']}"} for net in nets for row in net["layers"]]


def _layer_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        start = f"{row['name']:<{width}}  {row['kind']:<5}"
        if not row["optimized"]:
            lines.append(f"{start}  kept {row['processor']}: {'; '.join(row['reasons'])}")
        elif not row["runs"]:
            lines.append(f"{start}  not called yet")
        for run in row["runs"]:
            lines.append(f"{start}  {run['backend']:<8}  {run['shape']}  {run['calls']} calls  ({run['reason']})")
    return lines


def _module_lines(modules: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{count} {kind}" for kind, count in modules["fused"].items())
    lines = [f"fused: {counts}"] if counts else []
    lines += [f"one product: {row['layers']} layers ({row['what']})" for row in modules["shared"]]
    alike: dict[tuple[str, str], list[str]] = {}
    for row in modules["kept"]:
        alike.setdefault((row["kind"], "; ".join(row["reasons"])), []).append(row["name"])
    for (kind, why), names in alike.items():
        what = f"{names[0]} ({kind})" if len(names) == 1 else f"{len(names)} {kind}"
        lines.append(f"not fused: {what}: {why}")
    return lines


def _vae_lines(row: dict[str, Any]) -> list[str]:
    kinds = dict.fromkeys((attn["head_dim"], attn["processor"], attn["sdpa"]) for attn in row["attention"])
    attention = [
        f"attention of head dim {dim}: as stock has it, {name}{f' ({sdpa} of PyTorch)' if sdpa else ''}"
        for dim, name, sdpa in kinds
    ]
    return _module_lines(row) + attention + (float16_decode.lines(row["decode"]) if "decode" in row else [])


def _check_arguments(attention: object, plan: object, capture: object, decode: object) -> None:
    if not isinstance(attention, (str, Backend)):
        raise InputError("attention", attention, f"known: {', '.join(backends.names())}")
    if plan is not None and not isinstance(plan, (Plan, str, Path)):
        raise InputError("plan", plan, "allowed: a Plan, the path of a saved one, or None")
    if capture is not None and not isinstance(capture, bool):
        raise InputError("capture", capture, "allowed: True, False or None")
    if decode is not None and decode not in float16_decode.MODES:
        raise InputError("decode", decode, f"known: {', '.join(float16_decode.MODES)}")


def _device(pipe: Any, unet: torch.nn.Module) -> torch.device:
    """Where the UNet will run: with offloading its weights wait elsewhere."""
    return torch.device(getattr(pipe, "_execution_device", None) or next(unet.parameters()).device)


def _read_plan(plan: Plan | str | Path | None, attention: str | Backend, device: torch.device) -> Plan | None:
    if plan is None:
        return None
    if not isinstance(plan, Plan):
        plan = Plan.load(plan, device)
    name = attention if isinstance(attention, str) else attention.name
    if name not in (AUTO, plan.attention):
        raise InputError("attention", name, f"the plan was made with attention={plan.attention!r}")
    return plan


def _check_plan_shapes(plan: Plan, models: dict[str, torch.nn.Module]) -> None:
    """Refuse a plan made for another model: every shape in it must be one that a layer of these can have."""
    attns = [attn for model in models.values() for attn in layers.attention_modules(model).values()]
    here = {(attn.heads, attn.inner_dim // attn.heads) for attn in attns}
    for shape in plan.choices:
        if (shape.heads, shape.head_dim) not in here:
            allowed = ", ".join(f"{heads} of {head_dim}" for heads, head_dim in sorted(here))
            raise OptimizeError(f"the plan has a layer with {shape}; this UNet's heads: {allowed}; make a new one")


def _candidates(attention: str | Backend, plan: Plan, device: torch.device) -> tuple[Backend, ...]:
    if attention != AUTO:
        return (backends.forced(attention, device),)
    for choice in plan.choices.values():
        backends.forced(choice.backend, device)
    return backends.auto_order(device)


def _check_forced(handle: Handle, models: dict[str, torch.nn.Module]) -> None:
    """Refuse a backend asked for by name before anything is touched, when a layer's head dim or dtype rules it out."""
    if handle.attention == AUTO:
        return
    for prefix, model in models.items():
        dtype = next(model.parameters()).dtype
        for name, attn in layers.attention_modules(model).items():
            if layers.reasons_to_keep(attn):
                continue
            probe = torch.empty((1, 64, attn.heads, attn.inner_dim // attn.heads), dtype=dtype, device=handle._device)
            AttentionLayer(prefix + name, handle._candidates, handle.plan).serving(probe, probe, probe, None)


def _check_shared(handle: Handle, models: dict[str, torch.nn.Module]) -> None:
    """Refuse a ControlNet that another handle's pipelines use, optimized with other arguments."""
    for other in _handles.values():
        if other is handle or (other.attention, other.capture) == (handle.attention, handle.capture):
            continue
        used = [net for net, pipe in other._controlnets.pairs() if pipe is not None]
        if any(net is model for net in used for model in models.values()):
            raise OptimizeError(
                f"its ControlNet is already optimized for another pipeline with attention={other.attention!r}, "
                f"capture={other.capture}; call restore() on that one's handle first"
            )


def _check_decode(handle: Handle, pipe: Any) -> None:
    """Refuse a VAE that another handle's pipelines decode with in another way."""
    vae = getattr(pipe, "vae", None)
    for other in _handles.values():
        same = other is handle or other.decode == handle.decode or vae is None
        if not same and any(getattr(user, "vae", None) is vae for user in other._live_pipelines()):
            raise OptimizeError(
                f"its VAE is already optimized for another pipeline with decode={other.decode!r}; "
                "call restore() on that one's handle first"
            )
