"""The training set as a plan: which pictures there are, what each is made of, its captions, how often it is seen.

Four kinds, all from the same artwork: the artwork itself; objects of one colour painted in another one, so that a
colour word paints whatever it stands before; one object small or big; several objects on one picture ("two red
hearts", "a red heart and a blue star"). Nothing that pairs.toml holds out is among them. The same plan on every run.
"""

import random
from collections import defaultdict
from dataclasses import dataclass
from itertools import product

from training import captions, pairs, recolour
from training.captions import Picture

# Shares of the batches; the rest is the artwork itself.
SHARES = {"repaint": 0.2, "small": 0.03, "big": 0.02, "two": 0.04, "three": 0.02, "four": 0.02, "beside": 0.06}
# How many different ones of each layout are made.
COUNTS = {"small": 500, "big": 300, "two": 700, "three": 350, "four": 350, "beside": 1400}
NUMBER_WORDS = {"two": 2, "three": 3, "four": 4}
SEED = 20261123

# Nouns whose plural is not made with an s, or that are plural already.
_NOT_COUNTED = {"fish", "tropical fish", "sheep", "deer", "goose", "mouse", "ox", "leaf", "knife", "tooth", "foot",
                "chopsticks", "scissors", "glasses", "sunglasses", "jeans", "shorts", "bacon", "rice", "bread",
                "cherries", "grapes", "french fries", "blueberries", "beans", "coral", "salt", "butter", "soap",
                "water", "snowman", "wolf", "moose", "squid", "herb", "cactus", "hippopotamus", "octopus"}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One training picture.

    Attributes:
        layout: `artwork`, `repaint`, or a layout of compose.py.
        sources: numbers of the pieces of artwork that it is made of.
        colours: what each is painted in; empty where it keeps its own.
        concepts: what it shows, without colours and numbers.
        captions: CAPTIONS_PER_PICTURE of them.
        weight: how often it is seen; all weights together are 1.
    """

    layout: str
    sources: tuple[int, ...]
    colours: tuple[str, ...]
    concepts: frozenset[str]
    captions: tuple[str, ...]
    weight: float


def plan(pictures: list[Picture], held: pairs.Pairs, seed: int = SEED, repaints: bool = True) -> list[Example]:
    """All examples made from the artwork; without `repaints` only the artwork itself."""
    usable = [n for n, picture in enumerate(pictures) if not held.holds_out(picture.concepts, picture.style, "")]
    made = [_example("artwork", pictures, (n,), ("",), captions.captions_of(pictures[n]), held) for n in usable]
    if repaints:
        paints = _paints(pictures, usable, held)
        for number, word in paints:
            texts = captions.captions_of(pictures[number], word)
            made.append(_example("repaint", pictures, (number,), (word,), texts, held))
        made += _composed(pictures, usable, paints, held, random.Random(seed))
    return _weighed([example for example in made if example is not None])


def _example(
    layout: str,
    pictures: list[Picture],
    sources: tuple[int, ...],
    colours: tuple[str, ...],
    texts: list[str],
    held: pairs.Pairs,
) -> Example | None:
    """The example with the captions that are allowed, or None where none is."""
    allowed = [text for text in texts if not held.forbids(text)]
    if not allowed:
        return None
    while len(allowed) < captions.CAPTIONS_PER_PICTURE:
        allowed += allowed[: captions.CAPTIONS_PER_PICTURE - len(allowed)]
    concepts = frozenset[str]().union(*(pictures[n].concepts for n in sources))
    weight = sum(pictures[n].weight for n in sources) / len(sources)
    return Example(layout, sources, colours, concepts, tuple(allowed), weight)


def _paints(pictures: list[Picture], usable: list[int], held: pairs.Pairs) -> list[tuple[int, str]]:
    """Which pictures are painted in which colour: objects of one colour, in all colours the artwork lacks."""
    present = {(picture.style, picture.name) for picture in pictures}
    found = []
    for word, number in product(recolour.PAINTS, usable):
        picture = pictures[number]
        if not captions.recolourable(picture) or word == picture.colour or word in picture.name.split():
            continue
        title = f"{word} {captions.colourless(picture.name)}"
        if (picture.style, title) not in present and not held.holds_out(picture.concepts, picture.style, word):
            found.append((number, word))
    return found


def _composed(
    pictures: list[Picture], usable: list[int], paints: list[tuple[int, str]], held: pairs.Pairs, rng: random.Random
) -> list[Example | None]:
    """Small, big, several: of objects of one colour with a short name, in their own colour or painted."""
    objects = [(n, "") for n in usable if captions.recolourable(pictures[n])]
    if not objects:
        return []
    things = objects + rng.sample(paints, min(len(paints), len(objects)))
    countable = [thing for thing in things if captions.colourless(pictures[thing[0]].name) not in _NOT_COUNTED]
    by_style = {style: [t for t in countable if pictures[t[0]].style == style] for style in captions.STYLES}
    made: list[Example | None] = []
    for layout, count in COUNTS.items():
        pool = things if layout in ("small", "big") else countable
        for _ in range(min(count, 4 * len(pool))):
            chosen = [rng.choice(pool)]
            if layout == "beside":
                chosen.append(rng.choice(by_style[pictures[chosen[0][0]].style]))
                if _thing(pictures, chosen[0]) == _thing(pictures, chosen[1]):
                    continue
            sources, colours = zip(*chosen, strict=True)
            phrase, bare = _phrases(layout, [_thing(pictures, thing) for thing in chosen])
            texts = captions.captions_of_phrase(phrase, bare, pictures[sources[0]].style)
            made.append(_example(layout, pictures, sources, colours, texts, held))
    different = {(e.layout, e.sources, e.colours): e for e in made if e is not None}
    return list(different.values())


def _thing(pictures: list[Picture], thing: tuple[int, str]) -> str:
    number, colour = thing
    return f"{colour} {captions.colourless(pictures[number].name)}" if colour else pictures[number].name


def _phrases(layout: str, things: list[str]) -> tuple[str, str]:
    """What is asked for, with articles and without."""
    if layout in NUMBER_WORDS:
        text = f"{layout} {pairs.plural(things[0])}"
        return text, text
    if layout == "beside":
        return " and ".join(captions.with_article(thing) for thing in things), " and ".join(things)
    return f"a {layout} {things[0]}", f"{layout} {things[0]}"


def _weighed(made: list[Example]) -> list[Example]:
    """The same examples, each kind with its share and the artwork with the rest; weights sum to 1."""
    totals: dict[str, float] = defaultdict(float)
    for example in made:
        totals[example.layout] += example.weight
    shares = {layout: share for layout, share in SHARES.items() if totals[layout]}
    shares["artwork"] = 1 - sum(shares.values())
    return [
        Example(e.layout, e.sources, e.colours, e.concepts, e.captions, e.weight * shares[e.layout] / totals[e.layout])
        for e in made
    ]
