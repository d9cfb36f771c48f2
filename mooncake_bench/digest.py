"""Is it still the same code? One digest of the source files that a result depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable


def digest_of_source(places: Sequence[str]) -> str:
    """Of all Python and TOML below the places, like "workloads" or "mooncake_bench/slo.py"."""
    digest = hashlib.sha256()
    for place in places:
        package, *below = place.split("/")
        for name, content in files_of(resources.files(package).joinpath(*below)):
            if name.endswith((".py", ".toml")):
                digest.update(name.encode() + content)
    return digest.hexdigest()


def files_of(place: Traversable) -> list[tuple[str, bytes]]:
    """Name and content of a file, or of every file below a directory in order of the names."""
    if place.is_file():
        return [(place.name, place.read_bytes())]
    found: list[tuple[str, bytes]] = []
    for entry in sorted(place.iterdir(), key=lambda one: one.name):
        found += files_of(entry)
    return found
