"""The file that `diffopt tune` writes, shape by shape: the attention table of a GPU's TOML file.

What else the file holds (peaks, price, comments) stays as it is. A file whose table does not fit what would be added
to it is refused, and only `--again` starts its table over; a file that can't be read is then moved aside, and one
about another GPU is never touched. Rows with a launch that these kernels don't have are dropped.
"""

import dataclasses
import datetime
import os
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.items import InlineTable, Table

from diffopt.attention.tuning import unknown_launch
from diffopt.config import ConfigError
from diffopt.errors import DiffoptError
from diffopt.gpus import TunedAttention, TunedShape, read_gpu
from diffopt.measure.ceilings import Ceilings
from diffopt.whole_file import check_whole, write_whole
from diffopt_kernels.launch import AttentionLaunch, LaunchKey

_VERSIONS = ("torch", "triton", "cudnn", "driver", "kernels")
_ABOUT = (
    "Written by `diffopt tune`. Times are microseconds per call in a CUDA graph, inputs hot, fastest first;",
    "`launch` is how diffopt's kernel takes its time. torch to kernels are what was measured with.",
)


class TuningFileError(DiffoptError):
    """A tuning file that can't be continued or written."""


@dataclasses.dataclass
class TuningFile:
    """A GPU's file while it is being tuned.

    Attributes:
        path: where it is.
        gpu: the GPU, as the driver calls it.
        table: what is in it by now.
        dropped: why rows that are in the file are not in the table, a text for each.
    """

    path: Path
    gpu: str
    table: TunedAttention
    dropped: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path, gpu: str, header: TunedAttention, *, again: bool) -> "TuningFile":
        """Continue the file at `path`, or begin one; nothing is written yet.

        Args:
            header: what is tuned with now.
            again: start over where what is there does not fit.

        Raises:
            TuningFileError: it is no file, or about another GPU; or, without `again`, it can't be read, or its shapes
                were measured with other versions; or, with it, it can't be moved aside.
        """
        if not path.exists():
            return cls(path, gpu, header)
        if not path.is_file():
            raise TuningFileError(f"{path} is a folder or device; choose a file with --output")
        try:
            there = read_gpu(path)
        except ConfigError as error:
            if not again:
                raise TuningFileError(f"{error}; --again moves {path} aside and starts over") from error
            try:
                os.replace(path, path.with_name(f"{path.name}.old"))
            except OSError as why:
                raise TuningFileError(f"{path} can't be moved aside: {why.strerror}") from why
            return cls(path, gpu, header)
        if there.name != gpu:
            raise TuningFileError(
                f"{path} is about {there.name}, this is {gpu}; move it away, or choose another --output"
            )
        if there.attention is None:
            return cls(path, gpu, header)
        differing = [key for key in _VERSIONS if getattr(there.attention, key) != getattr(header, key)]
        if not differing:
            date = there.attention.date  # of rows from before rows had their own
            fitting = tuple(
                dataclasses.replace(shape, date=shape.date or date)
                for shape in there.attention.shapes
                if not unknown_launch(shape)
            )
            dropped = tuple(filter(None, map(unknown_launch, there.attention.shapes)))
            return cls(path, gpu, dataclasses.replace(there.attention, commit=header.commit, shapes=fitting), dropped)
        if not again:
            was, now = (
                ", ".join(f"{key} {getattr(table, key)}" for key in differing) for table in (there.attention, header)
            )
            raise TuningFileError(f"{path} was tuned with {was}, here it is {now}; --again starts over")
        return cls(path, gpu, header)

    def has(self, key: LaunchKey, dtype: str) -> bool:
        """Whether this shape is tuned already."""
        return any((shape.key, shape.dtype) == (key, dtype) for shape in self.table.shapes_with(self.table.triton))

    def check_writable(self) -> None:
        """Find out before the work that `keep` will be able to write.

        Raises:
            TuningFileError: it won't.
        """
        try:
            check_whole(self.path)
        except OSError as error:
            raise TuningFileError(f"{self.path}: can't be written: {error.strerror}") from error

    def measured(self, ceilings: Ceilings) -> None:
        """Take these ceilings; they are written with the next row."""
        self.table = dataclasses.replace(self.table, **dataclasses.asdict(ceilings))

    def keep(self, row: TunedShape) -> None:
        """Add or replace a row and write the file, whole or not at all; rows of another Triton stay.

        Raises:
            TuningFileError: it can't be written.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        new = dataclasses.replace(row, date=now)
        rows = {(x.key, x.dtype, x.triton or self.table.triton): x for x in (*self.table.shapes, new)}
        self.table = dataclasses.replace(self.table, date=now, shapes=tuple(rows.values()))
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all.

        Raises:
            TuningFileError: it can't be written.
        """
        try:
            write_whole(self.path, self._text())
        except OSError as error:
            raise TuningFileError(f"{self.path}: can't be written: {error.strerror}") from error

    def _text(self) -> str:
        if self.path.exists():
            document = tomlkit.parse(self.path.read_text(encoding="utf-8"))
        else:
            document = tomlkit.document()
            document["name"] = self.gpu
        document.pop("attention", None)
        document["attention"] = _table(self.table)
        return tomlkit.dumps(document)


def _table(table: TunedAttention) -> Table:
    written = tomlkit.table()
    for line in _ABOUT:
        written.add(tomlkit.comment(line))
    for field in dataclasses.fields(table):
        if field.name != "shapes":
            written[field.name] = getattr(table, field.name)
    rows = tomlkit.aot()
    for shape in table.shapes:
        rows.append(_row(shape))
    written["shapes"] = rows
    return written


def _row(shape: TunedShape) -> Table:
    row = tomlkit.table()
    for field in dataclasses.fields(shape):
        value = getattr(shape, field.name)
        if isinstance(value, AttentionLaunch):
            value = _settings(value)
        if value is not None:
            row[field.name] = _inline(value) if isinstance(value, dict) else value
    return row


def _settings(launch: AttentionLaunch) -> dict[str, Any]:
    """A launch's fields but those that have their default."""
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(launch)
        if (value := getattr(launch, field.name)) != field.default
    }


def _inline(values: dict[str, Any]) -> InlineTable:
    table = tomlkit.inline_table()
    table.update(values)
    return table
