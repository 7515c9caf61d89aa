"""Which words are never trained together, so that a measure can ask for what the model has not seen.

pairs.toml lists concepts with the one style, and concepts with the one colour, that training leaves out: the
pictures and every caption that holds both words. It lists colour prompts that are trained too, for the same measure.
"""

import functools
import hashlib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

PAIRS = Path(__file__).parent / "pairs.toml"


@dataclass(frozen=True)
class Pair:
    """A concept ("banana") and a style or a colour ("fluent", "purple")."""

    concept: str
    word: str


@dataclass(frozen=True)
class Pairs:
    """The lists of pairs.toml: held out by style, held out by colour, and colour prompts that are trained."""

    styles: tuple[Pair, ...]
    colours: tuple[Pair, ...]
    seen_colours: tuple[Pair, ...]

    @functools.cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], re.Pattern[str]], ...]:
        """For each style and colour: a pattern of the word, and one of all concepts held out with it."""
        concepts: dict[str, list[str]] = {}
        for pair in (*self.styles, *self.colours):
            concepts.setdefault(pair.word, []).extend({pair.concept, plural(pair.concept)})
        return tuple(
            (re.compile(rf"\b{word}\b"), re.compile(rf"\b({'|'.join(map(re.escape, names))})\b"))
            for word, names in concepts.items()
        )

    def forbids(self, caption: str) -> bool:
        """Whether a caption holds a held-out concept, in singular or plural, and the word it is held out with."""
        return any(word.search(caption) and names.search(caption) for word, names in self._patterns)

    def holds_out(self, concepts: frozenset[str], style: str, colour: str) -> bool:
        """Whether a picture of any of these concepts, in this style, painted in this colour, is left out."""
        return any(pair.concept in concepts and pair.word == style for pair in self.styles) or any(
            pair.concept in concepts and pair.word == colour for pair in self.colours
        )


NONE = Pairs((), (), ())


def plural(name: str) -> str:
    """`heart` becomes `hearts`, `cherry` becomes `cherries`, `box` becomes `boxes`; regular nouns only."""
    if re.search(r"[^aeiou]y$", name):
        return f"{name[:-1]}ies"
    return f"{name}es" if re.search(r"(s|x|z|ch|sh)$", name) else f"{name}s"


def read_pairs(path: Path = PAIRS) -> Pairs:
    """Read the pinned lists."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))

    def listed(section: dict[str, list[str]]) -> tuple[Pair, ...]:
        return tuple(Pair(concept, word) for word, concepts in section.items() for concept in concepts)

    return Pairs(
        listed(table["held_out"]["style"]), listed(table["held_out"]["colour"]), listed(table["trained"]["colour"])
    )


def pairs_hash(path: Path = PAIRS) -> str:
    """SHA-256 of the lists: a model names it, so that a measure knows whether the pairs were held out from it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
