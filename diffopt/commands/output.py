"""What commands print: in any encoding, to a reader that may leave early, or into a file on a disk that may be full."""

import codecs
import contextlib
import errno
import io
import json
import os
import sys

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What happens to a file without a name, which stdout is, where a disk is full or fails."""

_ESCAPED = "diffopt-escaped"


def speak_any_language() -> None:
    """Let stdout write what its encoding lacks, such as × in ASCII, as JSON would: `\\u00d7`."""
    codecs.register_error(_ESCAPED, _escaped)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors=_ESCAPED)


def print_whole(text: str) -> None:
    """Print a command's result. A reader that leaves early, such as `head`, changes nothing of the exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop_output()


def drop_output() -> None:
    """Nothing more is written to stdout: the interpreter would try again when it ends, and complain."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end
