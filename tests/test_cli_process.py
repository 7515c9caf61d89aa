"""The command line as a process of its own: what it imports, what it writes, and how it ends when interrupted."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from sample_records import a_step_record
from tiny_model import save_tiny_model

from diffopt.bench.record import append_record
from diffopt.engine.png import read_png

LISTING = """
import json, sys
from diffopt.cli import main
code = main(sys.argv[1:])
print(json.dumps(sorted(sys.modules)))
raise SystemExit(code)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


def environment() -> dict[str, str]:
    """As a user's, not as the tests': compiled kernels, one thread because the model is tiny."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "diffopt.cli", *map(str, arguments)]


def run(arguments: list[str], **options) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, "text": True, "timeout": 300, "env": environment(), **options}
    return subprocess.run(arguments, check=False, **options)


def listing(*arguments: object) -> tuple[int, set[str], str]:
    """Run a command: exit code, the modules it imported, stderr."""
    done = run([sys.executable, "-c", LISTING, *map(str, arguments)])
    return done.returncode, set(json.loads(done.stdout.splitlines()[-1])), done.stderr


PLOTS = ("matplotlib", "skimage")
PROGRESS = re.compile(r"(picture \d+ of \d+)? *\d+% \|[^|]*\| \d+/\d+ \[[\d:?]+<[\d:?]*\]\s*|\s*")


def test_generate_needs_neither_page_nor_bench_and_writes_nothing_but_progress(model, tmp_path):
    arguments = ("generate", "a cat", "--model", model, "--device", "cpu", "--steps", 3, "-n", 2, "-o", tmp_path)
    code, modules, err = listing(*arguments)
    assert code == 0
    assert "torch" in modules
    for unwanted in ("gradio", "fastapi", "uvicorn", "diffopt.ui", "diffopt.bench", "diffopt.commands.bench", *PLOTS):
        assert unwanted not in modules
    parts = re.split(r"[\r\n]", err)
    assert [part for part in parts if not PROGRESS.fullmatch(part)] == []
    assert any("picture 2 of 2" in part and "6/6" in part for part in parts)
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.parametrize(
    "words",
    [
        "generate cat --size 100x100",
        "generate cat --foo",
        "info nowhere.png",
        "verify --prompts 0",
        "verify --model emojy",
        "paint",
    ],
)
def test_mistakes_are_found_before_anything_heavy_is_imported(words):
    code, modules, err = listing(*words.split())
    assert code == 2
    assert err.count("\n") == 1
    assert not {"torch", "diffusers", "transformers"} & modules


def test_the_package_is_cheap_to_import():
    done = run([sys.executable, "-c", "import diffopt, diffopt.models, sys; print('torch' in sys.modules)"])
    assert done.stdout == "False\n"


def test_help_shows_what_the_package_offers():
    done = run([sys.executable, "-c", "import diffopt; print(*dir(diffopt)); help(diffopt)"])
    names, _, text = done.stdout.partition("\n")
    assert {"DiffoptError", "load", "optimize", "optimized"} <= set(names.split())
    for function in ("load(", "optimize(", "optimized("):
        assert f"\n    {function}" in text


def test_a_full_disk_is_one_line_and_leaves_nothing(model, tmp_path):
    """A real limit on the size of files that the process may write."""
    done = run(
        command("generate", "a cat", "--model", model, "--device", "cpu", "--steps", 1, "-o", tmp_path / "out"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        env=environment() | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"diffopt: output {tmp_path / 'out'}: the disk is full; seed ")
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@contextlib.contextmanager
def started(*arguments: object):
    """A running command, killed at the end whatever happens."""
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_an_interrupt_stops_at_the_next_step_and_keeps_what_is_finished(model, tmp_path):
    options = ("--model", model, "--device", "cpu", "--steps", 30, "-n", 10, "-o", tmp_path)
    with started("generate", "a cat", *options) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 130
    printed = [Path(line.split("  ")[0]) for line in (first + out).splitlines()]
    assert 1 <= len(printed) < 10
    assert sorted(tmp_path.iterdir()) == sorted(printed)  # no temporary file, nothing unfinished
    for path in printed:
        read_png(path)
        Image.open(path).load()
    assert f"interrupted; pictures in {tmp_path}: {len(printed)} of 10" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("seconds", [0.0, 0.3, 0.8])
def test_an_interrupt_while_it_imports_ends_it_at_once(model, tmp_path, seconds):
    """`seconds` after torch begins to load. An interrupted import would leave libraries half there."""
    with started("generate", "a cat", "--model", model, "--device", "cpu", "--steps", 1000, "-o", tmp_path) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while "libtorch" not in maps.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
    assert err == "diffopt: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["doctor --device cpu", "report show FILE", "report show FILE --format json"])
def test_a_full_disk_under_what_is_printed_is_one_line(tmp_path, words):
    records = tmp_path / "records.jsonl"
    append_record(records, a_step_record())
    with open("/dev/full", "w") as full:
        done = run(
            command(*words.replace("FILE", str(records)).split()),
            capture_output=False,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert done.returncode == 2
    assert done.stderr == "diffopt: what it prints can't be written: No space left on device\n"


def test_what_an_encoding_lacks_is_printed_as_json_would(tmp_path):
    records = tmp_path / "records.jsonl"
    append_record(records, a_step_record())
    ascii_only = environment() | {"PYTHONIOENCODING": "ascii"}
    for form in ("table", "markdown", "csv", "json"):
        done = run(command("report", "show", records, "--format", form), env=ascii_only)
        assert (done.returncode, done.stderr) == (0, "")
    here, there = (
        json.loads(run(command("report", "show", records, "--format", "json"), env=env).stdout)
        for env in (environment(), ascii_only)
    )
    assert here == there


VERDICT = "from diffopt.commands.output import print_whole; print_whole('not exact'); raise SystemExit(1)"


@pytest.mark.parametrize(("words", "code"), [(["-m", "diffopt.cli", "report", "show"], 0), (["-c", VERDICT], 1)])
def test_a_result_that_nobody_reads_leaves_the_exit_code_as_it_is(words, code):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody:
        done = run([sys.executable, *words], capture_output=False, stdout=nobody, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_reader_that_leaves_early_is_no_error():
    done = run(["bash", "-c", f"{sys.executable} -m diffopt.cli doctor --device cpu | head -n 1"])
    assert done.returncode == 0
    assert done.stdout == "machine\n"
    assert done.stderr == ""
