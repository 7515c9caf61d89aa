"""On a GPU: the first call where nothing is compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu


def first_call(cache: Path) -> dict[str, Any]:
    """What first_call.py prints, with Triton's cache in a folder."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "first_call.py")],
        env={**os.environ, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_first_call_makes_the_picture_of_the_next(tmp_path: Path) -> None:
    """Bit for bit; each kernel is compiled once, in a thread, and a later process compiles none."""
    empty, full = first_call(tmp_path), first_call(tmp_path)
    assert empty["compiled"] == empty["kernels"] == empty["beside"] > 0
    assert full["compiled"] == 0
    for found in (empty, full):
        assert (found["compiled again"], found["uncaptured"]) == (0, [])
        assert found["same bits"]
        assert found["finite"]
