"""What `diffopt verify` found: the certificate of one model on one machine, in numbers; verdicts are made from them."""

from typing import Any, Literal

import pydantic

from diffopt.bench.attention.record import AttentionErrors, AttentionRule
from diffopt.bench.schema import BaseRecord, Model
from diffopt.bench.step.free_running_record import FreeRunning
from diffopt.bench.step.record import ModelIdentity
from diffopt.measure.teacher_forced import Certificate


def share_of(errors: AttentionErrors, limit: AttentionErrors) -> float:
    """The larger of both errors as a share of its limit."""
    return max(errors.relative_l2 / limit.relative_l2, errors.maximum / limit.maximum)


class LayerErrors(Model):
    """One attention shape of the model by the kernel rule (`diffopt_kernels.attention_check`).

    Attributes:
        shape: rows × query tokens × key tokens, heads, head dim, dtype.
        layers: how many of the UNet's layers run it.
        backend: what runs it. reason: why.
        rules: per content of the inputs PyTorch's errors, the limit, and those of a planted fault.
        errors: of what runs, by content.
        nonfinite: NaN and infinite elements in its outputs.
        redrawn: contents whose first draw came just beyond its limit, so that the worst of further draws stands here.
        fault_can_show: with a single key no wrong scale can.
    """

    shape: str
    layers: int
    backend: str
    reason: str
    rules: list[AttentionRule]
    errors: dict[str, AttentionErrors]
    nonfinite: int
    redrawn: int = 0
    fault_can_show: bool = True

    @property
    def void(self) -> bool:
        """The planted fault passes, or none was planted."""
        if not self.fault_can_show:
            return False
        return not any(rule.fault for rule in self.rules) or any(rule.void for rule in self.rules)

    @property
    def right(self) -> bool:
        """Every error within its limit, every element finite, and not void."""
        within = all(self.errors[rule.content].within(rule.limit) for rule in self.rules)
        return within and self.nonfinite == 0 and not self.void

    @property
    def share(self) -> float:
        """The largest error as a share of what is allowed; above 1 it fails."""
        return max(share_of(self.errors[rule.content], rule.limit) for rule in self.rules)


class Verification(BaseRecord):
    """The certificate. Sizes in pixels.

    Attributes:
        scheduler: its class, and the name that it was asked for by.
        attention: what `optimize` was asked for.
        layers: the kernel rule, shape by shape.
        exactness: the step rule, teacher-forced.
        free_running: whole pictures; only a NaN of ours fails here.
        plan: the handle's summary: what each layer ran, how often and why.
        notes: what was not checked, and how it could be.
        seconds: the whole check took.
    """

    kind: Literal["verify"] = "verify"
    model: ModelIdentity
    dtype: str
    width: int
    height: int
    steps: int
    scheduler: str
    guidance: float
    attention: str
    layers: list[LayerErrors] = pydantic.Field(min_length=1)
    exactness: Certificate
    free_running: FreeRunning
    plan: dict[str, Any]
    notes: list[str]
    seconds: float

    @property
    def void(self) -> bool:
        """A planted fault went unnoticed: the check proves nothing."""
        return self.exactness.void or any(layer.void for layer in self.layers)

    @property
    def passed(self) -> bool:
        """Every layer shape and every step is within its limit, nothing of ours is NaN, and the check isn't void."""
        return not self.void and self.exactness.passed and all(x.right for x in self.layers) and self.nonfinite_ok

    @property
    def nonfinite_ok(self) -> bool:
        """No NaN or infinity that stock hasn't too."""
        return self.free_running.finite and self.exactness.nonfinite == 0 and not any(x.nonfinite for x in self.layers)

    @property
    def nonfinite(self) -> int:
        """NaN and infinite values of ours: layer shapes, steps and pictures together."""
        layers = sum(layer.nonfinite for layer in self.layers)
        return layers + self.exactness.nonfinite + self.free_running.nonfinite_ours

    @property
    def bitwise_stock(self) -> bool:
        """Every step that was replayed and every picture is bit for bit stock's."""
        return self.exactness.bitwise_stock and self.free_running.ours.identical == self.free_running.prompts

    def verdict(self) -> str:
        """One line: passed, FAILED or void, with the numbers that decided."""
        worst = max(self.layers, key=lambda layer: layer.share)
        void = [layer.shape for layer in self.layers if layer.void]
        if void:
            return f"void: the planted fault was not caught at {', '.join(void)}"
        if self.exactness.void:
            return self.exactness.verdict()
        right = sum(layer.right for layer in self.layers)
        words = (
            f"{right} of {len(self.layers)} layer shapes, the worst at {worst.share:.2f} of its limit; "
            f"steps {self.exactness.verdict()}; NaN or infinite: {self.nonfinite}"
        )
        return f"{'passed' if self.passed else 'FAILED'}: {words}"
