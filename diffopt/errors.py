"""The errors a user can cause, each one clear line: what was wrong, and what is allowed."""

from collections.abc import Mapping, Sequence


class DiffoptError(Exception):
    """Root of every error diffopt raises on purpose. Its text is one line, ready to be shown to a user."""


class InputError(DiffoptError, ValueError):
    """A value the user gave can't be used.

    Attributes:
        field: the name of the argument, option or form field.
        value: what was given.
        allowed: what would have been accepted, in words.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}: {value!r} is not possible; {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class ModelError(DiffoptError):
    """A model that can't be loaded: missing, damaged, unsafe, or not what its configuration says."""


class BackendError(DiffoptError):
    """An attention backend that was asked for by name and can't serve; carries every reason.

    Attributes:
        reasons: backend name to the reasons why it can't serve.
    """

    def __init__(self, reasons: Mapping[str, Sequence[str]], *, allowed: str = "") -> None:
        why = "; ".join(f"{name} can't serve: {', '.join(texts)}" for name, texts in reasons.items())
        super().__init__(f"{why}; {allowed}" if allowed else why)
        self.reasons = {name: list(texts) for name, texts in reasons.items()}


class OptimizeError(DiffoptError):
    """A pipeline that can't be optimized as asked, or a handle used in a way that would lose something."""


def one_line(error: BaseException, length: int = 200) -> str:
    """An error of a library in one line of at most `length` characters."""
    text = " ".join(str(error).split()).rstrip(".;") or type(error).__name__
    return text if len(text) <= length else text[: length - 3] + "..."
