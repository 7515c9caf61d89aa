"""Figures that others published (configs/published/<name>.toml), shown beside measured ones and marked as such."""

import dataclasses

from diffopt.config import ConfigError, config_names, read_config

MARK = "published, not measured here"


@dataclasses.dataclass(frozen=True)
class PublishedRow:
    """One GPU: iterations per second before and after."""

    gpu: str
    before_its: float
    after_its: float

    @property
    def gain(self) -> float:
        """After over before."""
        return self.after_its / self.before_its


@dataclasses.dataclass(frozen=True)
class Published:
    """One publication.

    Attributes:
        source: where the figures are from. date: of their publication, ISO 8601.
        conditions: what was run, as far as it was said.
    """

    title: str
    source: str
    date: str
    conditions: str
    rows: tuple[PublishedRow, ...]


def published() -> list[Published]:
    """All of them.

    Raises:
        ConfigError: a file that isn't what it should be.
    """
    found = []
    for name in config_names("published"):
        publication = read_config("published", name, Published)
        for row in publication.rows:
            if min(row.before_its, row.after_its) <= 0:
                raise ConfigError(f"{name}.toml: {row.gpu}: iterations per second above 0 are needed")
        found.append(publication)
    return found
