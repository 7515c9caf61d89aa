"""Parts of pipelines beside the UNet (schedulers, decoders), changed while an optimized pipeline uses them."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class Parts:
    """Changed parts, each with the pipeline that it is for; neither is kept alive."""

    def __init__(self, take_off: Callable[[Any], None]) -> None:
        """
        Args:
            take_off: undoes the change of a part, where it is still in place.
        """
        self._take_off = take_off
        self._pairs: list[tuple[weakref.ref[Any], weakref.ref[Any]]] = []

    def note(self, part: Any, pipe: Any) -> None:
        """Remember a part that was changed for a pipeline. Done again, it changes nothing."""
        if not any(known is part and user is pipe for known, user in self.pairs()):
            self._pairs.append((weakref.ref(part), weakref.ref(pipe)))

    def pairs(self) -> list[tuple[Any, Any]]:
        """Parts that are alive, with their pipelines (None for those that are not)."""
        found = [(part(), pipe(), (part, pipe)) for part, pipe in self._pairs]
        self._pairs = [pair for part, _, pair in found if part is not None]
        return [(part, pipe) for part, pipe, _ in found if part is not None]

    def keep_only(self, pipelines: Sequence[Any], everywhere: Iterable["Parts"]) -> None:
        """Give the parts of all other pipelines back, but for those that a pipeline in `everywhere` uses, too."""
        mine = self.pairs()
        kept = [pair for pair in mine if any(pair[1] is pipe for pipe in pipelines)]
        self._pairs = [(weakref.ref(part), weakref.ref(pipe)) for part, pipe in kept]
        used = [part for parts in everywhere for part, pipe in parts.pairs() if pipe is not None]
        for part, _ in mine:
            if not any(part is other for other in used):
                self._take_off(part)
