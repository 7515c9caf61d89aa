"""What all run records share: the version of the schema, the strict base models, and the error of a bad file."""

import uuid
from typing import Literal

import pydantic

from diffopt.errors import DiffoptError
from diffopt.measure.environment import Environment

SCHEMA_VERSION = 6
"""Written by this version. 1 had no whole pictures, flags and prices, 2 no free-running pictures, 3 no peers of
denoising steps and no profile, 4 no warm start, 5 no decode but stock's; all are readable."""

READABLE = (1, 2, 3, 4, 5, 6)


class RecordError(DiffoptError):
    """A file of records that can't be read or written; names the line."""


class Model(pydantic.BaseModel):
    """A frozen part of a record; an unknown field is an error, NaN and infinities are written as strings."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class BaseRecord(Model):
    """What every line of a file of records holds, whatever its `kind`."""

    schema_version: Literal[1, 2, 3, 4, 5, 6] = SCHEMA_VERSION
    id: str = pydantic.Field(default_factory=lambda: uuid.uuid4().hex)
    environment: Environment


def first_error(error: pydantic.ValidationError) -> str:
    """The first of pydantic's complaints as one line: where, and what."""
    first = error.errors()[0]
    return ": ".join(filter(None, (".".join(str(part) for part in first["loc"]), first["msg"])))
