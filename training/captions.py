"""Which pictures are used, how often each is seen, and the captions it is seen with.

A caption is the artwork's name in words, with or without an article, a style ("noto style"), a colour that the
picture has, and keywords. Captions without a style are given mostly to Noto pictures, so that a prompt without a
style has one answer and not an average of three.
"""

import random
import re
from dataclasses import asdict, dataclass, field
from typing import Any

STYLES = ("noto", "fluent", "twemoji")
CAPTIONS_PER_PICTURE = 12

# Of a picture's captions, those without a style.
PLAIN_ROWS = {"noto": 6, "fluent": 2, "twemoji": 2}

COLOUR_WORDS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey")

# emojibase's groups, and how often their pictures are seen. Flags (9) and components (2) are left out.
GROUP_WEIGHT = {0: 1.0, 1: 0.25, 3: 1.6, 4: 1.6, 5: 1.0, 6: 1.2, 7: 1.2, 8: 0.4}
OTHER_WEIGHT = 0.3  # artwork without a Unicode code point

_SKIN = re.compile(r"1f3f[b-f]")
_VARIANT = re.compile(r"skin-tone|-tone\d|-(light|medium|medium-light|medium-dark|dark)$|^flag-|regional-indicator")
_SIMPLE = re.compile(r"\b(heart|star|circle|square|apple|moon|sun|tree|flower|fish|bird|car|house|cat|dog)\b")
_RECOLOURABLE_SHAPE = re.compile(r"\b(heart|circle|square|star|triangle|balloon)\b")
_RECOLOURABLE_GROUPS = {3, 4, 5, 6, 7}


@dataclass
class Picture:
    """One piece of artwork; `colour` is its dominant colour's word, or empty, set after rendering."""

    style: str
    icon: str
    name: str
    label: str = ""
    tags: list[str] = field(default_factory=list)
    group: int = -1
    weight: float = 1.0
    colour: str = ""
    aliases: list[str] = field(default_factory=list)  # names of look-alikes that were dropped (duplicates.py)

    @property
    def concepts(self) -> frozenset[str]:
        """What the picture shows, whatever its colour: `red apple` and `green apple` are both `apple`."""
        return frozenset(colourless(name) for name in (self.name, self.label, *self.aliases) if name)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def words_of(icon: str) -> str:
    """The name of an icon in words: `red-apple` becomes `red apple`."""
    return icon.replace("-", " ").strip()


def _weight(name: str, group: int) -> float:
    weight = GROUP_WEIGHT.get(group, OTHER_WEIGHT)
    words = len(name.split())
    if words >= 4:
        weight *= 0.5
    if group != 1 and words <= 2:
        weight *= 1.3
    return weight * (1.5 if _SIMPLE.search(name) and words <= 2 else 1.0)


def choose(style: str, icons: list[str], chars: dict[str, str], emojibase: list[dict[str, Any]]) -> list[Picture]:
    """Pick the artwork of one style that is used: no skin-tone variants, no flags.

    `chars` maps code points ("1f34e") to icon names; `emojibase` gives labels, keywords and groups by code points.
    """
    known = {_plain(entry["hexcode"]): entry for entry in emojibase}
    codes: dict[str, str] = {}
    for code, icon in chars.items():
        codes.setdefault(icon, code)
    chosen = []
    for icon in sorted(icons):
        code = codes.get(icon, "")
        if _SKIN.search(code) or _VARIANT.search(icon):
            continue
        entry = known.get(_plain(code), {})
        group = entry.get("group", -1)
        if group in (2, 9):
            continue
        name = words_of(icon)
        label = entry.get("label", "").replace(":", "").lower()
        tags = [tag for tag in entry.get("tags", []) if tag.isalpha() and tag.isascii()]
        chosen.append(Picture(style, icon, name, label, tags, group, _weight(name, group)))
    return chosen


def _plain(code: str) -> str:
    """Code points without the variation selector, in lower case: what both tables agree on."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def recolourable(picture: Picture) -> bool:
    """Whether the picture is an object of one colour that may be painted in another."""
    return len(picture.name.split()) <= 2 and is_coloured_object(picture)


def is_coloured_object(picture: Picture) -> bool:
    """Whether one colour rules the picture and says something about it: nobody asks for an orange grinning face."""
    thing = picture.group in _RECOLOURABLE_GROUPS or bool(_RECOLOURABLE_SHAPE.search(picture.name))
    return bool(picture.colour) and thing


def colourless(name: str) -> str:
    """The name without its colour word: `red apple` becomes `apple`."""
    return " ".join(word for word in name.split() if word not in COLOUR_WORDS) or name


def with_article(name: str) -> str:
    """`apple` becomes `an apple`; names that already start with an article or a number stay."""
    if name.split()[0] in ("a", "an", "the") or name[0].isdigit():
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def in_style(phrase: str, style: str, row: int) -> str:
    """The phrase with its style in words; one row in three says it in another way than `a cat, noto style`."""
    return (
        (f"{phrase} in {style} style", f"{style} style {phrase}")[row // 3 % 2]
        if row % 3 == 2
        else (f"{phrase}, {style} style")
    )


def captions_of(picture: Picture, colour: str = "") -> list[str]:
    """CAPTIONS_PER_PICTURE captions for one picture, the same on every run.

    With `colour` the picture is a repainted one, and every caption starts from that colour.
    """
    rng = random.Random(f"{picture.style}/{picture.icon}/{colour}")
    if colour:
        names = [f"{colour} {colourless(picture.name)}"]
    else:
        names = [picture.name] * 3 + ([picture.label] if picture.label else []) + picture.aliases[:4]
        if is_coloured_object(picture) and not set(picture.name.split()) & set(COLOUR_WORDS):
            names += [f"{picture.colour} {picture.name}"] * 2
    plain_rows = PLAIN_ROWS[picture.style]
    captions = []
    for row in range(CAPTIONS_PER_PICTURE):
        name = rng.choice(names) if row % 4 else names[0]
        if row % 3 == 1:
            name = with_article(name)
        if row >= CAPTIONS_PER_PICTURE - 2 and picture.tags and not colour:
            name = ", ".join([name, *rng.sample(picture.tags, min(2, len(picture.tags)))])
        captions.append(name if row < plain_rows else in_style(name, picture.style, row))
    return captions


def captions_of_phrase(phrase: str, bare: str, style: str) -> list[str]:
    """CAPTIONS_PER_PICTURE captions of a composed picture: `a red heart and a blue star`, and without articles."""
    rows = range(CAPTIONS_PER_PICTURE)
    told = [bare if row % 3 == 1 else phrase for row in rows]
    return [
        text if row < PLAIN_ROWS[style] else in_style(text, style, row) for row, text in zip(rows, told, strict=True)
    ]
