"""`diffopt verify`: the certificate of a model on this machine: layer shapes, steps, whole pictures."""

import time

import torch

from diffopt.attention.backends import AUTO
from diffopt.bench.random_configs import KINDS, random_kind
from diffopt.bench.report.extras import INSTALL
from diffopt.bench.step.case import Progress
from diffopt.bench.step.check import check_steps
from diffopt.bench.step.contenders import load_subject, twin
from diffopt.bench.step.free_running import free_running, other_backend
from diffopt.bench.step.picture_clock import quiet
from diffopt.bench.verify.layer_check import check_layers, masked_shapes
from diffopt.bench.verify.record import Verification
from diffopt.bench.workloads import Case
from diffopt.handle import optimize
from diffopt.measure.environment import environment
from diffopt.measure.teacher_forced import record_unet_calls, spread_out, stock_forwards
from diffopt.models import model_config_for
from diffopt.models.schedulers import make_scheduler

CPU_STEPS = 10
"""Denoising steps of a picture on a CPU, and half as many are replayed: the whole takes a minute or two there."""


def verify_case(
    model: str, device: torch.device, *, prompts: int, steps: int | None = None, guidance: float | None = None
) -> Case:
    """What is run: the model at its own size.

    Args:
        model: as `diffopt.load` takes it, or random:<kind> for random weights.
        steps: of each picture; by default the model's, on a CPU at most `CPU_STEPS`.
        guidance: 1 or less is none, one UNet row for a picture instead of two; by default the model's.

    Raises:
        InputError, ModelError: no such model.
    """
    cpu = device.type == "cpu"
    kind = random_kind(model)
    if kind in KINDS:
        config = KINDS[kind]
        width = height = config.unet["sample_size"] * 2 ** (len(config.vae["block_out_channels"]) - 1)
        usual, scale = 30, 7.5
    else:
        defaults = model_config_for(model).defaults
        width, height, usual, scale = defaults.width, defaults.height, defaults.steps, defaults.guidance
    return Case(
        name="verify",
        model=model,
        width=width,
        height=height,
        steps=steps or (min(usual, CPU_STEPS) if cpu else usual),
        repetitions=1,
        warmup=0,
        unet_repetitions=1,
        unet_warmup=0,
        guidance=scale if guidance is None else guidance,
        exactness_steps=CPU_STEPS // 2 if cpu else 0,
        free_running_prompts=prompts,
    )


def verify(
    case: Case, device: torch.device, *, attention: str = AUTO, scheduler: str | None = None, progress: Progress
) -> Verification:
    """Check one model; nothing is timed.

    Args:
        scheduler: one of `diffopt.models.SCHEDULERS`, or None for the model's own.
        progress: is told the stage, how much of it is done and how much there is.
    """
    began = time.monotonic()
    progress("load the model", 0, 1)
    subject = load_subject(case, device)
    stock = subject.pipe
    if scheduler is not None:
        stock.scheduler = make_scheduler(scheduler, stock.scheduler)
    optimized = twin(stock)
    handle = optimize(optimized, attention=attention)
    progress("first pictures", 0, 2)

    def latents(pipe: object) -> None:
        with quiet(pipe):
            pipe(**subject.prompt_arguments(0), output_type="latent")  # pyright: ignore[reportCallIssue]

    calls, outputs = record_unet_calls(stock.unet, lambda: latents(stock))
    progress("first pictures", 1, 2)
    latents(optimized)
    layers = check_layers(handle, device, lambda done, total: progress("layer shapes against float64", done, total))
    steps = spread_out(len(calls), case.exactness_steps)
    progress("denoising steps, teacher-forced", 0, len(steps))
    certificate = check_steps(
        stock,
        optimized,
        calls,
        outputs,
        attention=attention,
        steps=steps,
        on_step=lambda done: progress("denoising steps, teacher-forced", done, len(steps)),
    )
    progress("whole pictures", 0, case.free_running_prompts)
    pictures = free_running(
        stock,
        optimized,
        subject.prompt_arguments,
        prompts=case.free_running_prompts,
        other=other_backend(calls[0], outputs[0], stock_forwards(stock.unet)),
        on_picture=lambda done: progress("whole pictures", done, case.free_running_prompts),
    )
    notes = [f"not checked, because they are masked: {', '.join(masked)}"] if (masked := masked_shapes(handle)) else []
    if pictures.ours.ssim is None:
        notes.append(f"SSIM needs scikit-image: {INSTALL}")
    return Verification(
        environment=environment(device),
        model=subject.identity,
        dtype=str(stock.unet.dtype).removeprefix("torch."),
        width=case.width,
        height=case.height,
        steps=case.steps,
        scheduler=type(stock.scheduler).__name__ + (f" ({scheduler})" if scheduler else ""),
        guidance=case.guidance,
        attention=attention,
        layers=layers,
        exactness=certificate,
        free_running=pictures,
        plan=handle.summary(),
        notes=notes,
        seconds=time.monotonic() - began,
    )
