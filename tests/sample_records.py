"""Records made by hand, for the tests of reading, writing and reporting."""

import dataclasses
import math
from typing import Any

from diffopt.bench.attention.record import (
    AttentionErrors,
    AttentionFigure,
    AttentionMethod,
    AttentionRecord,
    AttentionRule,
)
from diffopt.bench.attention.selfcheck_record import SelfcheckRecord
from diffopt.bench.step.free_running_record import FreeRunning, PictureDifferences
from diffopt.bench.step.peer_record import StepPeer
from diffopt.bench.step.record import Comparison, Contender, Method, ModelIdentity, Pictures, StepRecord, Workload
from diffopt.bench.step.warm_start_record import WarmStart
from diffopt.bench.verify.record import LayerErrors, Verification
from diffopt.bench.workloads import AttentionShape
from diffopt.measure.ceilings import Ceilings
from diffopt.measure.decoding import DecodeCertificate
from diffopt.measure.environment import Environment, Machine, Software
from diffopt.measure.memory import PeakMemory
from diffopt.measure.teacher_forced import Certificate, StepDistance
from diffopt.measure.timing import Spread, paired_ratio


def an_environment(gpu: str | None = "NVIDIA Test", time_utc: str = "2026-11-23T10:00:00+00:00") -> Environment:
    machine = Machine(gpu, 10**9, "9.0", 700.0, "1.2", "13.0", "91900", "Test CPU", 2, 2, 10**10, "Linux")
    return Environment(machine, Software("3.11", {"torch": "2"}, "abc", False, "def"), time_utc)


def a_certificate(ours: float = 1e-3, fault: float = 1e-1, **changes: Any) -> Certificate:
    step = StepDistance(step=0, timestep=999.0, ours=ours, fault=fault, stock={"sdpa-math": 1e-3}, allowed=2e-3)
    certificate = Certificate("float16", "float32", 1.5, 5e-4, (step,), 31, "scale × 1.01", 0, False)
    return dataclasses.replace(certificate, **changes)


def a_decode_certificate(**changes: Any) -> DecodeCertificate:
    """One that passes, of a decoder that overflows in plain float16."""
    fields: dict[str, Any] = {"ours": 1e-3, "fault": 1e-1, "float16": math.inf, "bfloat16": 1e-2, "allowed": 2e-3}
    fields |= {"near": 1.0, "levels": 1, "nonfinite": 0, "pictures": 2, "fault_name": "a scale wrong by 2"}
    return DecodeCertificate(**{**fields, **changes})


def some_pictures(whole_s: list[float], **changes: Any) -> Pictures:
    """Pictures whose stages take 10%, 70% and 15% of the whole."""
    fields: dict[str, Any] = {
        "whole_s": whole_s,
        "text_encoder_s": [0.1 * second for second in whole_s],
        "unet_s": [0.7 * second for second in whole_s],
        "vae_s": [0.15 * second for second in whole_s],
        "png_s": [0.01 for _ in whole_s],
        "images_per_s": 1 / Spread.of(whole_s).median,
    }
    return Pictures(**{**fields, **changes})


def some_differences(**changes: Any) -> PictureDifferences:
    fields = {"left": "stock", "right": "diffopt", "psnr_db": [math.inf, 50.0], "ssim": [1.0, 0.99]}
    return PictureDifferences(**{**fields, "max_difference": [0, 3], **changes})


def some_free_running(**changes: Any) -> FreeRunning:
    """Two prompts; ours is as far from stock as stock on another backend."""
    stock = some_differences(right="stock on sdpa-math", psnr_db=[51.0, 49.0], max_difference=[2, 4])
    fields = {"prompts": 2, "steps": 10, "ours": some_differences(), "stock": stock}
    return FreeRunning(**{**fields, "nonfinite_ours": 0, "nonfinite_stock": 0, **changes})


def a_contender(loop_s: list[float], reserved: int, pictures: Pictures | None = None) -> Contender:
    spread = Spread.of(loop_s)
    unet_s = [second / 40 for second in loop_s]
    return Contender(
        loop_s=loop_s,
        call_s=loop_s,
        unet_s=unet_s,
        loop=spread,
        call=spread,
        unet=Spread.of(unet_s),
        loop_its=30 / spread.median,
        unet_its=1 / Spread.of(unet_s).median,
        memory=PeakMemory(None, None, reserved, reserved),
        pictures=pictures,
    )


def a_peer(name: str, loop_s: list[float] | None = None, **changes: Any) -> StepPeer:
    """A peer that took these times for 30 steps, beside ours of 1.0, 1.1 and 0.9 seconds; exact."""
    loop_s = loop_s or [1.5, 1.6, 1.4]
    spread, ours = Spread.of(loop_s), [1.0, 1.1, 0.9]
    fields: dict[str, Any] = {"name": name, "state": "timed", "distances": [1e-3], "first_call_s": 60.0}
    if changes.get("why") is None:
        fields |= {"loop_s": loop_s, "unet_s": loop_s, "loop": spread, "unet": spread}
        fields |= {"loop_its": 30 / spread.median, "unet_its": 1 / spread.median}
        fields |= {"loop_ratio": paired_ratio(loop_s, ours), "unet_ratio": paired_ratio(loop_s, ours)}
    return StepPeer(**{**fields, **changes})


def a_warm_start(**changes: Any) -> WarmStart:
    """3.4 seconds, of 13.7 that the process took."""
    fields: dict[str, Any] = {"steps": 20, "process_s": 0.1, "imports_s": 6.1, "device_s": 0.3, "weights_s": 4.2}
    fields |= {"optimize_s": 0.5, "picture_s": 2.5, "second_picture_s": 0.6, "warm_start_s": 3.4}
    return WarmStart(**{**fields, **changes})


def a_step_record(
    *,
    case: str = "sd15-512",
    certificate: Certificate | None = None,
    decode: DecodeCertificate | str | None = None,
    loops: tuple[list[float], list[float]] = ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9]),
    pictures: tuple[Pictures | None, Pictures | None] = (None, None),
    work: dict[str, Any] | None = None,
    **changes: Any,
) -> StepRecord:
    """A case, twice as fast as stock unless `loops` (stock's and ours, in seconds) says otherwise.

    With `decode`, a certificate or why there is none, its pictures are decoded in float16.
    """
    certificate = certificate or a_certificate()
    decoded = decode is None or (isinstance(decode, DecodeCertificate) and decode.passed)
    model = ModelIdentity(name="random:sd15", hash="0" * 64, seed=0, score_std=(2.9, 3.1), parameters=10)
    timed: dict[str, Any] = {}
    if certificate.passed and decoded:
        stock, optimized = a_contender(loops[0], 1000, pictures[0]), a_contender(loops[1], 900, pictures[1])
        timed = {
            "stock": stock,
            "optimized": optimized,
            "comparison": Comparison(
                loop=paired_ratio(stock.loop_s, optimized.loop_s),
                unet=paired_ratio(stock.unet_s, optimized.unet_s),
                peak_memory=0.9,
            ),
            "method": Method(
                clock="a clock",
                warmup=1,
                repetitions=3,
                unet_warmup=1,
                unet_repetitions=3,
                first_call_s={"stock": 3.0, "optimized": 9.0},
                clocks_before=None,
                clocks_after=None,
            ),
        }
    plan = {"layers": [{"optimized": True, "runs": [{"backend": "diffopt", "calls": 7}]}, {"optimized": False}]}
    fields: dict[str, Any] = {
        "environment": an_environment(),
        "workload": Workload.model_validate(
            {
                "name": "step",
                "case": case,
                "model": model,
                "dtype": "float16",
                "width": 512,
                "height": 512,
                "batch": 1,
                "steps": 30,
                "unet_calls": 31,
                "scheduler": "PNDMScheduler",
                "guidance": 7.5,
                "seed": 0,
                **({"decode": "float16"} if decode else {}),
                **(work or {}),
            }
        ),
        "attention": "auto",
        "exactness": certificate,
        "plan": plan,
        **({"decode_why": decode} if isinstance(decode, str) else {"decode": decode}),
        **timed,
        **changes,
    }
    return StepRecord(**fields)


def a_selfcheck_case(error: float = 1e-4, **changes: Any) -> dict[str, Any]:
    errors = {"relative_l2": error, "maximum": error}
    limit = {"relative_l2": 2e-4, "maximum": 2e-4}
    case = {"case": "sd15-512 self 64x64", "dtype": "float16", "ours": errors, "math": errors, "fused": None}
    return {**case, "limit": limit, "overrun": False, **changes}


def a_selfcheck(**changes: Any) -> dict[str, Any]:
    """What diffopt_kernels.selfcheck writes, with one right launch and one that crashed."""
    right = {
        "index": 0,
        "label": "d40 64 64x64",
        "right": True,
        "void": "",
        "seed": 3,
        "cases": [a_selfcheck_case()],
        "faults": [a_selfcheck_case(1e-2)],
    }
    crashed = {"index": 1, "label": "d40 32+16 64x64", "right": False, "failure": "process ended with -6"}
    timing = {"head_dim": 40, "case": "a", "keys": "long", "what": "cudnn", "microseconds": 12.5}
    return {"device": "NVIDIA Test", "torch": "2", "launches": [right, crashed], "timings": [timing], **changes}


def a_selfcheck_record(**changes: Any) -> SelfcheckRecord:
    table = a_selfcheck()
    fields = {"environment": an_environment(), "launches": table["launches"], "timings": table["timings"], **changes}
    return SelfcheckRecord.model_validate(fields)


def attention_errors(size: float) -> AttentionErrors:
    return AttentionErrors(relative_l2=size, maximum=size)


def attention_rules(dtype: str, fault: float = 1e-2) -> list[AttentionRule]:
    """What the judge says of one dtype: at most 2e-3 in both contents, and a planted fault of this size."""
    exact, limit = attention_errors(1e-3), attention_errors(2e-3)
    common: dict[str, Any] = {"dtype": dtype, "math": exact, "fused": exact, "limit": limit}
    return [
        AttentionRule(content="normal", **common),
        AttentionRule(content="spread 3", fault=attention_errors(fault), **common),
    ]


def an_attention_figure(name: str, us: float | None, dtype: str = "float16", **changes: Any) -> AttentionFigure:
    """A contender timed at about `us` (twice that with cold inputs), or one without times if None."""
    fields: dict[str, Any] = {"name": name, "dtype": dtype, "required": True, "state": "failed", "why": "it crashed"}
    if us is not None:
        hot = [us * factor for factor in (0.99, 1.0, 1.01)]
        errors = {"normal": attention_errors(1e-3), "spread 3": attention_errors(1e-3)}
        fields |= {"state": "timed", "why": "", "errors": errors, "peak_memory": 2 * 1024 * 8 * 40 * 2}
        fields |= {"hot_us": hot, "cold_us": [2 * x for x in hot], "calls": 20, "input_sets": 3}
    return AttentionFigure(**{**fields, **changes})


def an_attention_record(
    name: str = "sd15-512 self 32x32", figures: list[AttentionFigure] | None = None, **changes: Any
) -> AttentionRecord:
    """A shape whose best peer is fast-bf16 (0.9 of its time), before fast (0.8)."""
    figures = figures or [
        an_attention_figure("diffopt", 8.0),
        an_attention_figure("diffopt-bf16", 9.0, "bfloat16"),
        an_attention_figure("fast", 10.0),
        an_attention_figure("slow", 30.0),
        an_attention_figure("fast-bf16", 10.0, "bfloat16"),
    ]
    fields: dict[str, Any] = {
        "environment": an_environment(),
        "workload": "attention",
        "run": "run 1",
        "headline": (name,),
        "shape": AttentionShape(name, 2, 1024, 1024, 8, 40, headline=True),
        "ceilings": Ceilings(800.0, 4.0),
        "rules": [*attention_rules("float16"), *attention_rules("bfloat16")],
        "figures": figures,
        "method": AttentionMethod(
            clock="a clock", order="in turn", rounds=3, seed=0, clocks_before=None, clocks_after=None
        ),
        **changes,
    }
    return AttentionRecord(**fields)


def some_layer_errors(error: float = 1e-3, fault: float | None = 1e-2, **changes: Any) -> LayerErrors:
    """A layer shape where up to 2e-3 is allowed."""
    rules = [
        rule.model_copy(update={"fault": attention_errors(fault) if fault is not None and rule.fault else None})
        for rule in attention_rules("float16")
    ]
    fields = {"shape": "2×1024×77 8h d40 float16", "layers": 5, "backend": "diffopt", "reason": "fastest"}
    errors = {rule.content: attention_errors(error) for rule in rules}
    return LayerErrors(**{**fields, "rules": rules, "errors": errors, "nonfinite": 0, **changes})


def a_verification(**changes: Any) -> Verification:
    """A certificate that passes."""
    record = a_step_record()
    fields: dict[str, Any] = {
        "environment": record.environment,
        "model": record.workload.model,
        "dtype": "float16",
        "width": 512,
        "height": 512,
        "steps": 10,
        "scheduler": "PNDMScheduler",
        "guidance": 7.5,
        "attention": "auto",
        "layers": [some_layer_errors()],
        "exactness": a_certificate(),
        "free_running": some_free_running(),
        "plan": record.plan,
        "notes": [],
        "seconds": 1.0,
    }
    return Verification(**{**fields, **changes})
