"""The run record: one JSON object per line (JSONL), versioned, validated on read; reports are made from it.

Each kind of record has a module of its own (step.record, attention.selfcheck_record, attention.record), where fields
and units are documented. Here they are written and read.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pydantic

from diffopt.bench.attention.record import AttentionRecord
from diffopt.bench.attention.selfcheck_record import SelfcheckRecord
from diffopt.bench.schema import READABLE, SCHEMA_VERSION, RecordError, first_error
from diffopt.bench.step.record import StepRecord
from diffopt.gpus import slug

AnyRecord = StepRecord | SelfcheckRecord | AttentionRecord
"""Whatever a line can hold; its `kind` says which."""

_ADAPTER: pydantic.TypeAdapter[AnyRecord] = pydantic.TypeAdapter(
    Annotated[AnyRecord, pydantic.Field(discriminator="kind")]
)


def append_record(path: str | Path, record: AnyRecord) -> None:
    """Append one line, whole or not at all; the folder is made when it is missing.

    Raises:
        RecordError: the file can't be written (its former content is untouched).
    """
    path = Path(path)
    line = record.model_dump_json().encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise RecordError(f"{path}: can't be written: {error.strerror}") from error
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # a line cut off by someone else stays a damaged line of its own
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError(0, "the disk is full")
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, size)
            raise RecordError(f"{path}: can't be written: {error.strerror}") from error
    finally:
        os.close(descriptor)


def default_output(machine: str) -> Path:
    """out/bench/<machine>.jsonl under the current folder: never inside an install."""
    return Path("out") / "bench" / f"{slug(machine)}.jsonl"


def check_writable(path: str | Path) -> None:
    """Find out before the work that `append_record` will be able to write.

    Raises:
        RecordError: it won't.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise RecordError(f"{path}: can't be written: {error.strerror}") from error


def read_records(path: str | Path, *, skip: Callable[[RecordError], object] | None = None) -> list[AnyRecord]:
    """Every record of a file, in order.

    Args:
        skip: told of each line that can't be used, which is then left out; without it such a line is an error.

    Raises:
        RecordError: unreadable file, or a damaged, cut-off or unknown line, named by its number.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RecordError(f"{path}: can't be read: {error.strerror}") from error
    records: list[AnyRecord] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(_parse(line, f"{path}: line {number}"))
        except RecordError as error:
            if skip is None:
                raise
            skip(error)
    return records


def _parse(line: bytes, where: str) -> AnyRecord:
    try:
        table = pydantic.TypeAdapter(dict[str, Any]).validate_json(line)
    except pydantic.ValidationError as error:
        raise RecordError(f"{where} is not a record: cut off or damaged ({error.errors()[0]['msg']})") from error
    version = table.get("schema_version")
    if version not in READABLE:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        known = ", ".join(map(str, READABLE))
        advice = "update diffopt to read it" if newer else f"this diffopt reads versions {known}"
        raise RecordError(f"{where} has schema version {version!r}; {advice}")
    try:
        return _ADAPTER.validate_json(line)
    except pydantic.ValidationError as error:
        raise RecordError(f"{where} is not a valid record: {first_error(error)}") from error
