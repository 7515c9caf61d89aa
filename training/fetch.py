"""Step 1: fetch the artwork by package name, version and hash into training/cache (ignored by git).

`python -m training.fetch` runs `npm pack NAME@VERSION` for every package in sources.toml and refuses an archive
whose hash is not the pinned one. An archive that is already there is only checked.
"""

import argparse
import base64
import hashlib
import json
import subprocess
import sys
import tarfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffopt.errors import DiffoptError

CACHE = Path(__file__).parent / "cache"
SOURCES = Path(__file__).parent / "sources.toml"


class FetchError(DiffoptError):
    """An archive that can't be had, or whose hash is not the pinned one."""


@dataclass(frozen=True)
class Source:
    """One package: where it comes from and what its archive must hash to (npm's `sha512-<base64>`)."""

    name: str
    package: str
    version: str
    file: str
    integrity: str
    license: str
    author: str


def read_sources(path: Path = SOURCES) -> list[Source]:
    """Read the pinned packages."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return [Source(name=name, **fields) for name, fields in table.items()]


def integrity_of(archive: Path) -> str:
    """Hash a file the way the package registry writes it: `sha512-` and the digest in base64."""
    return "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()


def check(source: Source, archive: Path) -> None:
    """Raise FetchError, in one line, unless the archive is exactly the pinned one."""
    found = integrity_of(archive)
    if found != source.integrity:
        raise FetchError(
            f"{archive.name} of {source.package} {source.version} is not the pinned archive: "
            f"its hash is {found}, expected {source.integrity}; delete it and fetch again"
        )


def fetch(source: Source, cache: Path = CACHE) -> Path:
    """Return the checked archive of one package, fetching it with `npm pack` when it is not there."""
    archive = cache / source.file
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        order = ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
        try:
            done = subprocess.run(order, cwd=cache, capture_output=True, text=True)
        except FileNotFoundError:
            raise FetchError("npm is needed to fetch the artwork and was not found") from None
        if done.returncode or not archive.exists():
            reason = (done.stderr.strip().splitlines() or ["no archive came"])[-1]
            raise FetchError(f"{source.package}@{source.version} could not be fetched: {reason}")
    check(source, archive)
    return archive


def read_json(archive: Path, member: str) -> Any:
    """Read one JSON file out of a package archive."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"package/{member}")
        if file is None:
            raise FetchError(f"{archive.name} holds no {member}")
        return json.load(file)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args(arguments)
    try:
        for source in read_sources():
            print(f"{fetch(source, options.cache)}: {source.license}, hash as pinned", flush=True)
    except FetchError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
