"""The training set: what is composed, what is held out, what is a look-alike. On the real names, and constructed."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from training_pictures import as_bytes, disc, picture

from training import captions, compose, dataset, duplicates, examples, fetch, pairs, recolour, render
from training.captions import Picture

NAMES = Path(__file__).parent / "artwork_names.json.gz"
HELD = pairs.read_pairs()


@pytest.fixture(scope="module")
def artwork() -> list[Picture]:
    """What render.py writes beside the real pictures: names, keywords, colours."""
    return [Picture(**entry) for entry in json.loads(gzip.decompress(NAMES.read_bytes()))]


@pytest.fixture(scope="module")
def plan(artwork: list[Picture]) -> list[examples.Example]:
    return examples.plan(artwork, HELD)


def says(caption: str, pair: pairs.Pair) -> bool:
    """Whether a caption names the concept and the word, found without the patterns that training filters with."""
    words = caption.replace(",", " ").split()
    *first, last = pair.concept.split()
    forms = {last, f"{last}s", f"{last}es", f"{last[:-1]}ies"}
    for start in range(len(words) - len(first)):
        if words[start : start + len(first)] == first and words[start + len(first)] in forms:
            return pair.word in words
    return False


# what is held out


def test_no_training_caption_holds_a_held_out_pair(plan: list[examples.Example]):
    texts = {caption for example in plan for caption in example.captions}
    assert len(texts) > 80_000
    for pair in (*HELD.styles, *HELD.colours):
        found = [text for text in texts if pair.word in text and pair.concept[:-1] in text and says(text, pair)]
        assert found == []


def test_without_the_list_the_captions_do_hold_the_pairs(artwork: list[Picture]):
    texts = {caption for example in examples.plan(artwork, pairs.NONE) for caption in example.captions}
    for pair in (*HELD.styles, *HELD.colours):
        assert any(pair.word in text and says(text, pair) for text in texts), pair


def test_no_picture_of_a_held_out_pair_is_a_source(artwork: list[Picture], plan: list[examples.Example]):
    styles = {(pair.concept, pair.word) for pair in HELD.styles}
    colours = {(pair.concept, pair.word) for pair in HELD.colours}
    for example in plan:
        for number, colour in zip(example.sources, example.colours, strict=True):
            for concept in artwork[number].concepts:
                assert (concept, artwork[number].style) not in styles
                assert (concept, colour) not in colours
                assert (concept, artwork[number].colour) not in colours


def test_held_out_concepts_are_trained_in_the_other_styles_and_colours(
    artwork: list[Picture], plan: list[examples.Example]
):
    styles, colours = set(), Counter()
    for example in plan:
        if example.layout == "artwork":
            styles |= {(concept, artwork[example.sources[0]].style) for concept in example.concepts}
        if example.layout == "repaint":
            colours.update((concept, example.colours[0]) for concept in example.concepts)
    for pair in HELD.styles:
        assert {style for style in captions.STYLES if (pair.concept, style) in styles} == {
            style for style in captions.STYLES if style != pair.word
        }
    for pair in HELD.colours:
        assert sum(bool(colours[pair.concept, word]) for word in recolour.PAINTS) >= 5, pair


def test_there_are_40_pairs_and_40_colour_prompts_half_of_them_held_out():
    assert len(set(HELD.styles)) == 40
    assert len(set(HELD.colours)) == len(set(HELD.seen_colours)) == 20
    assert {pair.word for pair in HELD.styles} == set(captions.STYLES)


def test_the_other_colour_prompts_are_trained(plan: list[examples.Example]):
    texts = {caption for example in plan for caption in example.captions}
    for pair in HELD.seen_colours:
        assert f"{pair.word} {pair.concept}" in texts


@pytest.mark.parametrize(
    ("caption", "forbidden"),
    [
        ("a banana, fluent style", True),
        ("two bananas, fluent style", True),
        ("fluent style yellow banana", True),
        ("a banana, noto style", False),
        ("three strawberries in twemoji style", True),
        ("a red heart and a lemon", True),  # both words: the model could learn it from here
        ("yellow lemon", False),
        ("a pearl, fluent style", False),  # not a pear
    ],
)
def test_which_captions_are_forbidden(caption: str, forbidden: bool):
    assert HELD.forbids(caption) is forbidden


def test_plurals():
    assert [pairs.plural(name) for name in ("heart", "cherry", "box", "key")] == ["hearts", "cherries", "boxes", "keys"]


# the plan


def test_the_plan_is_the_same_on_every_run_and_depends_on_its_seed(artwork: list[Picture]):
    few = [entry for entry in artwork if entry.group in (4, 5)][:150]
    assert examples.plan(few, HELD) == examples.plan(few, HELD)
    assert examples.plan(few, HELD) != examples.plan(few, HELD, seed=1)


def test_every_kind_has_its_share_and_no_example_is_there_twice(plan: list[examples.Example]):
    shares = Counter()
    for example in plan:
        shares[example.layout] += example.weight
        assert len(example.captions) == captions.CAPTIONS_PER_PICTURE
    assert sum(shares.values()) == pytest.approx(1.0)
    for layout, share in examples.SHARES.items():
        assert shares[layout] == pytest.approx(share), layout
    assert len({(e.layout, e.sources, e.colours) for e in plan}) == len(plan)


def test_composed_pictures_are_captioned_by_what_they_are_made_of(artwork: list[Picture], plan: list[examples.Example]):
    for example in plan:
        things = [(artwork[n].name, colour) for n, colour in zip(example.sources, example.colours, strict=True)]
        names = [f"{colour} {captions.colourless(name)}" if colour else name for name, colour in things]
        text = example.captions[0]
        if example.layout in ("small", "big"):
            assert text.startswith(f"a {example.layout} ")
            assert names[0] in text
        elif example.layout in examples.NUMBER_WORDS:
            assert text.startswith(example.layout)
            assert pairs.plural(names[0]) in text
        elif example.layout == "beside":
            assert " and a" in text
            assert all(name in text for name in names)
            assert artwork[example.sources[0]].style == artwork[example.sources[1]].style
        for colour in filter(None, example.colours):
            assert colour in text


def test_a_concept_has_no_colour_and_all_names():
    entry = picture("red apple", label="red apple", aliases=["cooking apple"])
    assert entry.concepts == {"apple", "cooking apple"}
    assert picture("orange").concepts == {"orange"}


def test_styles_are_asked_for_in_several_ways():
    texts = captions.captions_of(picture(style="fluent"))
    assert {"a red apple, fluent style", "red apple in fluent style", "fluent style red apple"} <= set(texts)


def test_the_committed_names_are_those_of_the_rendered_artwork(artwork: list[Picture]):
    pack = fetch.CACHE / "data" / render.PACK
    if not pack.exists():
        pytest.skip("the artwork is not rendered here: python -m training.render")
    assert dataset.read_manifest(pack) == artwork


# pixels

RED, BLUE = as_bytes(disc((0.9, 0.1, 0.1), 64)), as_bytes(disc((0.1, 0.2, 0.9), 64))


def ink(rgb: torch.Tensor) -> torch.Tensor:
    """How much of each pixel is painted, [P, H, W] in 0..1; the edges of a disc count in part."""
    return (255 - rgb[:, 1].float()) / 230


@pytest.mark.parametrize(
    ("layout", "times"), [("small", 0.45**2), ("two", 2 * 0.54**2), ("three", 3 * 0.25), ("four", 4 * 0.25)]
)
def test_objects_are_drawn_as_often_and_as_large_as_the_layout_says(layout: str, times: float):
    drawn = compose.compose(layout, [RED])
    assert drawn.shape == RED.shape
    assert ink(drawn).sum() / ink(RED).sum() == pytest.approx(times, rel=0.05)
    side = round(compose.LAYOUTS[layout][0] * 64)
    for down, across in compose.LAYOUTS[layout][1]:
        assert drawn[0, 0, int(down * 64), int(across * 64)] > 200  # red, and not white
        assert drawn[0, 1, int(down * 64), int(across * 64)] < 50
    assert side < 64


def test_two_objects_stand_side_by_side_with_white_between():
    drawn = compose.compose("beside", [RED, BLUE])[0]
    assert drawn[0, 32, 16] > 200
    assert drawn[2, 32, 16] < 50
    assert drawn[2, 32, 47] > 200
    assert drawn[0, 32, 47] < 50
    assert (drawn[:, :, 32] == 255).all()


def test_big_is_larger_and_stays_whole():
    drawn = compose.compose("big", [RED])
    assert ink(drawn).sum() == pytest.approx((8 / 7) ** 2 * ink(RED).sum().item(), rel=0.05)


def test_views_are_slightly_moved_and_scaled_on_white_and_repeatable():
    many = RED.expand(64, -1, -1, -1).contiguous()
    views = compose.view(many, torch.Generator().manual_seed(3))
    assert torch.equal(views, compose.view(many, torch.Generator().manual_seed(3)))
    sizes = ink(views).sum(dim=(1, 2)) / ink(RED).sum()
    assert sizes.min() > compose.SMALLEST**2 - 0.05
    assert sizes.max() < compose.LARGEST**2 + 0.05
    assert sizes.max() - sizes.min() > 0.2
    assert (views[:, :, 0] > 250).all()
    rows = torch.arange(64.0)[None]
    centres = (ink(views).sum(dim=2) * rows).sum(dim=1) / ink(views).sum(dim=(1, 2))
    assert (centres - 31.5).abs().max() <= 64 * compose.SHIFT * 1.2
    assert centres.std() > 0.3


# look-alikes


def test_look_alikes_of_one_style_are_kept_once_under_all_their_names():
    nearly = RED.clone()
    nearly[0, :, 30, 30] += 20
    entries = [
        picture("man astronaut", tags=["space"]),
        picture("astronaut", label="astronaut"),
        picture("blue circle"),
        picture("astronaut", style="twemoji"),
    ]
    kept = duplicates.merge(entries, torch.cat([nearly, RED, BLUE, RED]))
    assert kept == [1, 2, 3]
    assert entries[1].aliases == ["man astronaut"]
    assert entries[3].aliases == []
    assert "man astronaut" in entries[1].concepts


def test_pictures_that_differ_are_all_kept():
    green = as_bytes(disc((0.1, 0.8, 0.1), 64))
    entries = [picture("red"), picture("blue"), picture("green")]
    assert duplicates.merge(entries, torch.cat([RED, BLUE, green])) == [0, 1, 2]


def test_a_pack_has_the_same_bytes_on_every_run_and_its_hash_names_its_content(tmp_path: Path):
    for name in ("one", "two", "other"):
        content = [b"a different picture" if name == "other" else b"a picture"]
        render.pack([picture()], content, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert dataset.pack_hash(tmp_path / "one") != dataset.pack_hash(tmp_path / "other")
