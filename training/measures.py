"""The five measures of the bundled model. Each draws what it needs with fixed seeds and returns a `Measure`."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from training import autoencoder, captions, judge, score
from training.draw import draw
from training.duplicates import small
from training.examples import Example
from training.measure_record import Answer, Measure
from training.pairs import Pairs

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

SEEDS = {"concepts": 1000, "colours": 3000, "pairs": 5000, "steps": 1000, "other": 7000}  # of the first picture
CAPTIONS, STEP_PROMPTS = 200, 8
SEVERAL_STEPS = 100
GOALS = {"concepts": 0.80, "colours": 0.85, "pairs": 0.50, "autoencoder": 30.0, "steps": 0.25}


@dataclass(frozen=True)
class Subject:
    """What is measured and with what.

    Attributes:
        pipeline: the model; `steps` and `guidance` are used for every picture that does not say otherwise.
        examples: the training set's plan.
        gallery: called once, where nearest pictures are needed: all training pictures, uint8 [P, 3, H, W].
        artwork: uint8 [A, 3, H, W], for the autoencoder.
        limit: at most so many pictures a measure, to try things out.
        untrained: why the pairs may not be held out from this model, or None.
    """

    pipeline: "StableDiffusionPipeline"
    steps: int
    guidance: float
    examples: list[Example]
    gallery: Callable[[], torch.Tensor]
    artwork: torch.Tensor
    pairs: Pairs
    batch: int = 8
    limit: int | None = None
    untrained: str | None = None

    def drawn(self, prompts: list[str], first_seed: int, title: str, steps: int | None = None) -> torch.Tensor:
        """A picture of each prompt, the n-th from the n-th seed."""
        seeds = [first_seed + n for n in range(len(prompts))]
        used = steps or self.steps
        return draw(self.pipeline, prompts, seeds, steps=used, guidance=self.guidance, batch=self.batch, title=title)


def choose_captions(examples: list[Example], count: int, seed: int) -> list[tuple[str, Example]]:
    """Captions with what they describe, drawn as training draws them, each example at most once."""
    rng = random.Random(seed)
    chosen: dict[int, tuple[str, Example]] = {}
    weights = [example.weight for example in examples]
    while len(chosen) < min(count, len(examples)):
        number = rng.choices(range(len(examples)), weights)[0]
        caption = rng.choice(examples[number].captions)
        chosen.setdefault(number, (caption, examples[number]))
    return list(chosen.values())


def measure_concepts(subject: Subject) -> Measure:
    """Of captions of the data, how many give a picture whose nearest training pictures include the concept."""
    started, seed = time.monotonic(), SEEDS["concepts"]
    chosen = choose_captions(subject.examples, CAPTIONS, seed)[: subject.limit]
    prompts = [caption for caption, _ in chosen]
    pictures = subject.drawn(prompts, seed, "concepts")
    gallery = small(subject.gallery())
    shown = [example.concepts for example in subject.examples]
    right = score.concept_is_near(pictures, [example.concepts for _, example in chosen], gallery, shown)
    parts: dict[str, list[bool]] = {}
    for (_, example), hit in zip(chosen, right, strict=True):
        kind = example.layout if example.layout in ("artwork", "repaint") else "composed"
        parts.setdefault(kind, []).append(hit)
    return Measure(
        name="concepts",
        what=f"concept among the {score.NEAREST} nearest training pictures, {len(prompts)} captions of the data",
        value=_share(right),
        unit="share",
        goal=GOALS["concepts"],
        at_least=True,
        count=len(prompts),
        seed=seed,
        parts={name: _share(hits) for name, hits in sorted(parts.items())},
        answers=_answers(prompts, seed, right),
        seconds=_seconds(started),
    )


def measure_colours(subject: Subject) -> Measure:
    """Of colour prompts, half of them never trained, how many give a picture of the colour asked for."""
    started, seed = time.monotonic(), SEEDS["colours"]
    asked = [(pair, "trained") for pair in subject.pairs.seen_colours]
    asked += [(pair, "never seen") for pair in subject.pairs.colours]
    asked = asked[:: -(-len(asked) // subject.limit)] if subject.limit else asked
    prompts = [captions.with_article(f"{pair.word} {pair.concept}") for pair, _ in asked]
    pictures = subject.drawn(prompts, seed, "colours")
    hues = [score.modal_hue(picture) for picture in pictures]
    right = [score.has_hue(picture, pair.word) for picture, (pair, _) in zip(pictures, asked, strict=True)]
    parts = {
        kind: [hit for hit, (_, what) in zip(right, asked, strict=True) if what == kind]
        for kind in ("trained", "never seen")
    }
    return Measure(
        name="colours",
        what=f"modal hue within {score.HUE_TOLERANCE:.0f} degrees of the asked one, {len(prompts)} colour prompts",
        value=_share(right),
        unit="share",
        goal=GOALS["colours"],
        at_least=True,
        count=len(prompts),
        seed=seed,
        void=subject.untrained,
        parts={name: _share(hits) for name, hits in parts.items() if hits},
        answers=_answers(prompts, seed, right, [f"{hue:.0f}" for hue in hues]),
        seconds=_seconds(started),
    )


def measure_pairs(subject: Subject, model: judge.Judge, record: judge.JudgeRecord) -> Measure:
    """Of concepts in a style they were never trained in, how many the judge recognises."""
    started, seed = time.monotonic(), SEEDS["pairs"]
    asked = list(subject.pairs.styles)[: subject.limit]
    prompts = [f"{captions.with_article(pair.concept)}, {pair.word} style" for pair in asked]
    pictures = subject.drawn(prompts, seed, "pairs")
    answers = [[record.classes[n] for n in row] for row in judge.top_classes(model, pictures)]
    right = [any(pair.concept in names for names in row) for pair, row in zip(asked, answers, strict=True)]
    return Measure(
        name="pairs",
        what=f"concept among the judge's first {judge.TOP}, {len(prompts)} held-out concept and style pairs",
        value=_share(right),
        unit="share",
        goal=GOALS["pairs"],
        at_least=True,
        count=len(prompts),
        seed=seed,
        void=subject.untrained,
        answers=_answers(prompts, seed, right, [", ".join(names[0] for names in row) for row in answers]),
        seconds=_seconds(started),
    )


def measure_autoencoder(subject: Subject) -> Measure:
    """PSNR of artwork encoded and decoded; the mean is taken over squared errors, so that bad pictures weigh."""
    started = time.monotonic()
    pictures = subject.artwork[:: max(1, len(subject.artwork) // min(512, subject.limit or 512))]
    device = next(subject.pipeline.vae.parameters()).device
    psnr = autoencoder.reconstruction_psnr(subject.pipeline.vae, pictures.to(device))
    return Measure(
        name="autoencoder",
        what=f"PSNR of the autoencoder, {len(pictures)} pieces of artwork",
        value=round(psnr, 3),
        unit="dB",
        goal=GOALS["autoencoder"],
        at_least=True,
        count=len(pictures),
        seconds=_seconds(started),
    )


def measure_steps(subject: Subject) -> Measure:
    """How far pictures of the default steps are from those of 100 steps, as a share of how far two seeds are."""
    started, seed = time.monotonic(), SEEDS["steps"]
    chosen = choose_captions(subject.examples, CAPTIONS, seed)[: min(STEP_PROMPTS, subject.limit or STEP_PROMPTS)]
    prompts = [caption for caption, _ in chosen]
    few = subject.drawn(prompts, seed, "steps, few")
    many = subject.drawn(prompts, seed, "steps, many", SEVERAL_STEPS)
    other = subject.drawn(prompts, SEEDS["other"], "steps, another seed")
    return Measure(
        name="steps",
        what=f"RMS distance of {subject.steps} steps to {SEVERAL_STEPS}, as a share of that of two seeds, "
        f"{len(prompts)} captions",
        value=round(score.distance(few, many).mean().item() / score.distance(few, other).mean().item(), 4),
        unit="share",
        goal=GOALS["steps"],
        at_least=False,
        count=len(prompts),
        seed=seed,
        seconds=_seconds(started),
    )


def _share(right: list[bool]) -> float:
    return round(sum(right) / len(right), 4)


def _answers(prompts: list[str], seed: int, right: list[bool], found: list[str] | None = None) -> tuple[Answer, ...]:
    told = found or [""] * len(prompts)
    rows = zip(prompts, right, told, strict=True)
    return tuple(Answer(prompt=p, seed=seed + n, right=r, found=f) for n, (p, r, f) in enumerate(rows))


def _seconds(started: float) -> float:
    return round(time.monotonic() - started, 1)
