"""The measures of the bundled model on constructed pictures with a known answer: each can hold, and each can fail."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from training_pictures import as_bytes, disc, picture

from training import (
    dataset,
    draw,
    examples,
    judge,
    measure_record,
    measures,
    pairs,
    recolour,
    score,
    sheet,
)

GREY = as_bytes(disc((0.5, 0.5, 0.5)))
CPU = torch.device("cpu")

# colours


def painted(word: str) -> torch.Tensor:
    return as_bytes(recolour.repaint(disc((1.0, 0.85, 0.2)), word))[0]


@pytest.mark.parametrize("word", score.HUES)
def test_a_disc_painted_in_a_colour_has_its_hue_and_no_other(word: str):
    assert score.has_hue(painted(word), word)
    near = {"red": {"pink"}, "pink": {"red"}, "orange": {"yellow"}, "yellow": {"orange"}}.get(word, set())
    assert not any(score.has_hue(painted(word), other) for other in score.HUES if other not in {word, *near})


def test_every_paint_but_brown_has_an_asked_hue():
    assert set(score.HUES) == set(recolour.PAINTS) - {"brown"}


@pytest.mark.parametrize("degrees", [0.0, 3.0, 60.0, 137.0, 251.0, 357.0])
def test_the_modal_hue_is_that_of_most_pixels_also_around_red(degrees: float):
    import colorsys

    main = disc(colorsys.hsv_to_rgb(degrees / 360, 0.9, 0.8))[0]
    main[:, 14:18, 14:18] = torch.tensor(colorsys.hsv_to_rgb((degrees + 120) % 360 / 360, 1.0, 1.0))[:, None, None]
    assert score.turn_between(score.modal_hue(as_bytes(main)), degrees) < 2


def test_pale_pixels_do_not_count_and_a_grey_picture_has_no_hue():
    import colorsys

    pale = disc(colorsys.hsv_to_rgb(0.6, 0.25, 0.9))[0]  # a saturation of 0.25, everywhere
    assert math.isnan(score.modal_hue(as_bytes(pale)))
    pale[:, 10:16, 10:16] = torch.tensor(colorsys.hsv_to_rgb(0.0, 1.0, 1.0))[:, None, None]
    assert score.has_hue(as_bytes(pale), "red")
    assert not any(score.has_hue(GREY[0], word) for word in score.HUES)


def test_25_degrees_is_the_limit():
    import colorsys

    for degrees, holds in ((score.HUES["blue"] + 24, True), (score.HUES["blue"] + 27, False)):
        rgb = as_bytes(disc(colorsys.hsv_to_rgb(degrees / 360, 1.0, 1.0)))[0]
        assert score.has_hue(rgb, "blue") is holds


# nearest pictures


def test_a_concept_counts_when_it_is_among_the_five_nearest_and_not_as_the_sixth():
    shades = torch.cat([as_bytes(disc((0.9, 0.1 + 0.02 * n, 0.1))) for n in range(7)])
    gallery = score.small(shades)
    drawn, asked = shades[:1], [frozenset({"wanted"})]

    def shown(place: int) -> list[frozenset[str]]:
        return [frozenset({"wanted" if n == place else "other"}) for n in range(7)]

    assert score.concept_is_near(drawn, asked, gallery, shown(4)) == [True]
    assert score.concept_is_near(drawn, asked, gallery, shown(5)) == [False]


def test_the_distance_of_pictures_is_their_rms_difference():
    one, other = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8), torch.zeros((2, 3, 32, 32), dtype=torch.uint8)
    other[1] = 204
    assert score.distance(one, other).tolist() == pytest.approx([1.0, 0.2])


# whole measures, with a pipeline that draws what it is told to


class Painter:
    """Stands in for a pipeline: `answer(prompt, seed, steps)` is the picture, float [H, W, 3] in 0..1."""

    def __init__(self, answer: Any, coder: Any = None) -> None:
        self.answer, self.vae, self.scheduler = answer, coder, SimpleNamespace()

    def __call__(self, prompts: list[str], *, num_inference_steps: int, generator: list[Any], **_: Any) -> Any:
        seeds = [g.initial_seed() for g in generator]
        images = [self.answer(p, s, num_inference_steps) for p, s in zip(prompts, seeds, strict=True)]
        return SimpleNamespace(images=np.stack([image.permute(1, 2, 0).numpy() for image in images]))


COLOURS = {"red": (0.9, 0.1, 0.1), "blue": (0.1, 0.3, 0.9), "green": (0.2, 0.8, 0.2)}
SHAPES = ("circle", "bar", "cross")


def shape(name: str, colour: str = "red", side: int = 32) -> torch.Tensor:
    """A shape of one colour on white, [3, side, side]."""
    line = (torch.arange(side) - side / 2 + 0.5).abs()
    if name == "circle":
        return disc(COLOURS[colour], side)[0]
    short, long = line < side / 10, line < side / 2.5
    bar = short[:, None] & long[None]
    inside = bar if name == "bar" else bar | bar.T
    return torch.where(inside, torch.tensor(COLOURS[colour])[:, None, None], 1.0)


PLAN = [
    examples.Example("artwork", (n,), ("",), frozenset({name}), (f"{colour} {name}",), 1 / 9)
    for n, (name, colour) in enumerate((s, c) for s in SHAPES for c in COLOURS)
]
GALLERY = as_bytes(torch.stack([shape(s, c) for s in SHAPES for c in COLOURS]))
ASKED = pairs.Pairs(
    styles=tuple(pairs.Pair(name, "noto") for name in SHAPES),
    colours=(pairs.Pair("circle", "blue"), pairs.Pair("bar", "red")),
    seen_colours=(pairs.Pair("circle", "red"), pairs.Pair("cross", "green")),
)


def subject(answer: Any, **changed: Any) -> measures.Subject:
    fields: dict[str, Any] = {
        "pipeline": Painter(answer),
        "steps": 20,
        "guidance": 3.0,
        "examples": PLAN,
        "gallery": lambda: GALLERY,
        "artwork": GALLERY,
        "pairs": ASKED,
    }
    return measures.Subject(**(fields | changed))


def as_asked(prompt: str, *_: Any) -> torch.Tensor:
    """The shape and colour that the prompt names; red where it names none."""
    words = prompt.replace(",", "").split()
    colour = next((word for word in words if word in COLOURS), "red")
    return shape(next(word for word in words if word in SHAPES), colour)


def always_a_red_cross(*_: Any) -> torch.Tensor:
    return shape("cross")


def test_the_concept_measure_holds_for_right_pictures_and_not_for_one_picture():
    # Of 9 pictures five always include another shape: so the gallery has each five times.
    gallery, plan = GALLERY.repeat_interleave(5, 0), [example for example in PLAN for _ in range(5)]
    right = measures.measure_concepts(subject(as_asked, examples=plan, gallery=lambda: gallery))
    assert right.value == 1.0
    assert right.holds
    wrong = measures.measure_concepts(subject(always_a_red_cross, examples=plan, gallery=lambda: gallery))
    assert wrong.value == pytest.approx(1 / 3, abs=0.01)
    assert not wrong.holds
    assert [answer.right for answer in wrong.answers] == ["cross" in answer.prompt for answer in wrong.answers]


def test_the_colour_measure_holds_for_right_colours_and_tells_the_halves_apart():
    right = measures.measure_colours(subject(as_asked))
    assert (right.value, right.count, right.parts) == (1.0, 4, {"trained": 1.0, "never seen": 1.0})
    assert right.holds
    wrong = measures.measure_colours(subject(always_a_red_cross))
    assert wrong.parts == {"trained": 0.5, "never seen": 0.5}
    assert not wrong.holds


def test_what_the_model_may_have_seen_is_void_and_does_not_hold():
    result = measures.measure_colours(subject(as_asked, untrained="it was trained on these"))
    assert result.value == 1.0
    assert not result.holds
    assert "void: it was trained on these" in measure_record.table([result])


class Coder(torch.nn.Module):
    """An autoencoder whose pictures come back with an error of known size, in 0..1 units."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error, self.weight = error, torch.nn.Parameter(torch.zeros(1))

    def encode(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=x))

    def decode(self, z: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (torch.where(z > 0, z - 2 * self.error, z + 2 * self.error),)


@pytest.mark.parametrize(("error", "decibels", "holds"), [(0.01, 40.0, True), (0.1, 20.0, False)])
def test_the_autoencoder_is_measured_in_decibels(error: float, decibels: float, holds: bool):
    result = measures.measure_autoencoder(subject(as_asked, pipeline=Painter(as_asked, Coder(error))))
    assert result.value == pytest.approx(decibels, abs=0.01)
    assert result.holds is holds


@pytest.mark.parametrize(("change", "holds"), [(0.02, True), (0.5, False)])
def test_twenty_steps_are_held_against_a_hundred_and_another_seed(change: float, holds: bool):
    def answer(prompt: str, seed: int, steps: int) -> torch.Tensor:
        base = 0.2 if seed < measures.SEEDS["other"] else 0.6  # two seeds are 0.4 apart
        return torch.full((3, 32, 32), base + (change if steps == measures.SEVERAL_STEPS else 0.0))

    result = measures.measure_steps(subject(answer))
    assert result.value == pytest.approx(change / 0.4, rel=0.05)
    assert result.holds is holds


def test_captions_are_drawn_by_weight_once_each_and_the_same_on_every_run():
    heavy = [
        examples.Example("artwork", (n,), ("",), frozenset(), (f"c{n}",), 1.0 if n < 5 else 1e-9) for n in range(50)
    ]
    chosen = measures.choose_captions(heavy, 5, 1)
    assert sorted(caption for caption, _ in chosen) == ["c0", "c1", "c2", "c3", "c4"]
    assert measures.choose_captions(PLAN, 6, 3) == measures.choose_captions(PLAN, 6, 3)
    assert len(measures.choose_captions(PLAN, 100, 3)) == len(PLAN)


# the judge


@pytest.fixture(scope="module")
def trained() -> judge.Judge:
    labels = [n // 3 for n in range(9)]
    return judge.train(GALLERY.repeat(6, 1, 1, 1), labels * 6, 3, epochs=40)


@pytest.fixture
def about() -> judge.JudgeRecord:
    return judge.JudgeRecord([[name] for name in SHAPES], 1, 1.0, 1.0, 1, 9, 25, 11, "", "", "")


def test_a_small_judge_learns_shapes_and_its_accuracy_is_counted(trained: judge.Judge):
    larger = as_bytes(torch.stack([shape(name, "blue", 64) for name in SHAPES]))
    answers = judge.top_classes(trained, larger)
    assert judge.accuracy(answers, [0, 1, 2], 1) == 1.0
    assert judge.accuracy(answers, [1, 2, 0], 1) == 0.0
    assert judge.accuracy(answers, [1, 2, 0], 3) == 1.0


def test_the_pair_measure_asks_the_judge(
    trained: judge.Judge, about: judge.JudgeRecord, monkeypatch: pytest.MonkeyPatch
):
    top = judge.top_classes
    monkeypatch.setattr(judge, "top_classes", lambda model, rgb: top(model, rgb, 1))  # of three classes, not five
    assert measures.measure_pairs(subject(as_asked), trained, about).value == 1.0
    wrong = measures.measure_pairs(subject(always_a_red_cross), trained, about)
    assert wrong.value == pytest.approx(1 / 3, abs=0.01)
    assert not wrong.holds


def test_pictures_that_share_a_name_are_one_class():
    entries = [picture("red apple"), picture("green apple"), picture("pear", aliases=["quince"]), picture("quince")]
    classes, labels = judge.group_concepts(entries)
    assert labels[0] == labels[1] != labels[2] == labels[3]
    assert classes[labels[2]] == ["pear", "quince"]


def test_what_is_kept_from_the_judge_is_known_in_other_styles_and_no_held_out_pair():
    names = [f"thing {chr(97 + n)}" for n in range(20)]
    entries = [picture(name, style=style) for name in names for style in ("noto", "fluent", "twemoji")]
    entries.append(picture("alone"))
    held = pairs.Pairs(tuple(pairs.Pair(name, "noto") for name in names), (), ())
    _, labels = judge.group_concepts(entries)
    kept = judge.keep_back(entries, labels, held, 12, seed=1)
    assert len(kept) == len({labels[n] for n in kept}) == 12
    assert {entries[n].style for n in kept} == {"fluent", "twemoji"}
    assert kept == judge.keep_back(entries, labels, held, 12, seed=1)


def test_the_committed_judge_is_small_knows_every_held_out_concept_and_tells_its_accuracy():
    model, record = judge.load()
    assert judge.WEIGHTS.stat().st_size <= 2_000_000
    known = {name for names in record.classes for name in names}
    assert {pair.concept for pair in pairs.read_pairs().styles} <= known
    assert record.kept_back >= 200
    assert 0 < record.top1 < record.top5 < 1
    assert model(torch.zeros(1, 3, judge.SIDE, judge.SIDE)).shape == (1, len(record.classes))


def test_a_judge_whose_weights_were_changed_is_refused(tmp_path: Path):
    changed = tmp_path / judge.WEIGHTS.name
    changed.write_bytes(judge.WEIGHTS.read_bytes()[:-1] + b"x")
    with pytest.raises(judge.JudgeError, match="not the judge that"):
        judge.load(changed)


# drawing


def test_every_picture_has_its_own_seed_in_any_batch():
    def answer(prompt: str, seed: int, steps: int) -> torch.Tensor:
        return torch.full((3, 8, 8), seed / 255)

    for batch in (1, 3, 8):
        drawn = draw.draw(Painter(answer), ["a"] * 7, list(range(7)), steps=1, guidance=1.0, batch=batch)  # type: ignore[arg-type]
        assert drawn[:, 0, 0, 0].tolist() == list(range(7))


def test_a_picture_with_nan_is_an_error():
    painter = Painter(lambda *_: torch.full((3, 8, 8), float("nan")))
    with pytest.raises(FloatingPointError, match="NaN"):
        draw.draw(painter, ["a"], [1], steps=1, guidance=1.0)  # type: ignore[arg-type]


def test_the_sheet_has_48_different_prompts_in_eight_columns():
    assert len(set(sheet.GRID)) == sheet.COLUMNS * sheet.ROWS == 48
    page = sheet.compose_sheet(GALLERY[:4], ["a", "b", "c", "d"], 2)
    assert page.size == (64, 2 * (32 + 16))
    assert page.getpixel((16, 16)) == (230, 26, 26)
    assert sheet.compose_sheet(GALLERY[:4], [""] * 4, 2).size == (64, 64)


def test_all_training_pictures_are_made_as_planned():
    plan = [
        examples.Example("repaint", (0,), ("blue",), frozenset(), ("",), 0.5),
        examples.Example("artwork", (1,), ("",), frozenset(), ("",), 0.2),
        examples.Example("beside", (0, 1), ("green", ""), frozenset(), ("",), 0.3),
    ]
    made = dataset.make_pictures(plan, GALLERY)
    assert score.has_hue(made[0], "blue")
    assert torch.equal(made[1], GALLERY[1])
    left, right = made[2, :, :, :16], made[2, :, :, 16:]
    assert score.has_hue(left, "green")
    assert score.has_hue(right, "blue")
