"""The command line: `diffopt COMMAND`. Each command is a module of diffopt.commands, imported when it is asked for."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from diffopt.commands.output import FULL, drop_output, speak_any_language
from diffopt.commands.start import INTERRUPTED
from diffopt.errors import DiffoptError

COMMANDS = ("generate", "info", "ui", "bench", "report", "verify", "tune", "doctor")
"""In the order of the help. A command's module has `add_parser(commands)`, which sets `run`: arguments to exit code."""

WRONG_INPUT = 2


class UsageError(DiffoptError):
    """Arguments that a command doesn't take, or lacks."""


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as one line that says what is allowed, like every other bad input."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:  # found by the command's own parser, which knows what it takes
            options = [action.option_strings[-1] for action in self._actions if action.option_strings]
            self.error(f"unrecognized arguments: {' '.join(rest)}; allowed: {', '.join(options)}")
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for input that can't be used, 130 when interrupted."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    speak_any_language()
    try:
        parsed = _parser(words).parse_args(words)
        code = parsed.run(parsed)
        print(end="", flush=True)
        return code
    except DiffoptError as error:
        print(f"diffopt: {error}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("diffopt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        drop_output()
        return 0
    except OSError as error:
        if error.filename is not None or error.errno not in FULL:
            raise
        drop_output()
        print(f"diffopt: what it prints can't be written: {error.strerror}", file=sys.stderr)
        return WRONG_INPUT


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for a command line: the module of the command asked for, or all of them for help and mistakes."""
    parser = _Parser(prog="diffopt", description="Makes Stable Diffusion faster without changing the pictures.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    wanted = words[0] if words else None
    for name in (wanted,) if wanted in COMMANDS else COMMANDS:
        importlib.import_module(f"diffopt.commands.{name}").add_parser(commands)
    return parser


def _version() -> str:
    from diffopt import __version__

    return f"diffopt {__version__}"


if __name__ == "__main__":
    raise SystemExit(main())
