"""Which public traces are there, and how does one get on this machine, whole and unchanged?"""

from __future__ import annotations

import hashlib
import http.client
import os
import tomllib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import IO, Protocol
from urllib.request import urlopen

import msgspec

from workloads.errors import TraceError

# The largest trace of the catalogue has 10 MB; a longer answer is not the file.
SIZE_LIMIT_BYTES = 256 * 1024 * 1024
CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30.0


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A public trace: its address, the file name it gets, and what its bytes must hash to."""

    url: str
    file: str
    sha256: str
    licence: str
    format: str
    description: str


class Response(Protocol):
    """What an opener's context manager yields: bytes in pieces."""

    def read(self, amount: int, /) -> bytes:
        """At most `amount` bytes; empty at the end."""


Opener = Callable[[str], AbstractContextManager[Response]]


def open_url(url: str) -> AbstractContextManager[Response]:
    """The default opener: urllib, giving up on a silent server after TIMEOUT_S."""
    response: AbstractContextManager[Response] = urlopen(url, timeout=TIMEOUT_S)
    return response


@lru_cache(maxsize=1)
def read_catalogue() -> dict[str, Entry]:
    """All entries by name, as the package's catalogue.toml lists them."""
    text = files("workloads").joinpath("catalogue.toml").read_text(encoding="utf-8")
    return {name: msgspec.convert(value, Entry) for name, value in tomllib.loads(text).items()}


def fetch(
    name: str,
    directory: str | Path,
    opener: Opener = open_url,
    *,
    catalogue: Mapping[str, Entry] | None = None,
    size_limit_bytes: int = SIZE_LIMIT_BYTES,
) -> Path:
    """Download a trace into `directory` and return its path; a file already there is checked.

    The file appears under its name only when complete and of the right sha256. Raises TraceError,
    one line, for an unknown name, no network, a file too large or other bytes than listed.
    """
    catalogue = read_catalogue() if catalogue is None else catalogue
    if name not in catalogue:
        raise TraceError(f"no trace {name!r} in the catalogue; it has {', '.join(catalogue)}")
    entry, directory = catalogue[name], Path(directory)
    target = directory / entry.file
    if target.is_file() and sha256_of(target) == entry.sha256:
        return target
    # A neighbour file, so that the rename is one step on one file system.
    partial = directory / f".{entry.file}.{os.getpid()}.part"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file, opener(entry.url) as response:
            digest = _copy(name, response, file, size_limit_bytes)
        if digest != entry.sha256:
            raise TraceError(
                f"{name}: {entry.url} has sha256 {digest}, not {entry.sha256};"
                " the file was changed or cut on its way: nothing kept, try again or report it"
            )
        partial.replace(target)
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TraceError(
            f"{name}: {entry.url} not fetched ({reason}); check the network,"
            f" or put the file at {target}"
        ) from None
    finally:
        if partial.exists():
            partial.unlink()
    return target


def _copy(name: str, response: Response, file: IO[bytes], size_limit_bytes: int) -> str:
    """Stream the response into the file; its sha256."""
    digest, size = hashlib.sha256(), 0
    while chunk := response.read(CHUNK_BYTES):
        size += len(chunk)
        if size > size_limit_bytes:
            raise TraceError(
                f"{name}: the answer is over {size_limit_bytes} bytes, no trace of the catalogue"
                " is; nothing kept, check the address"
            )
        digest.update(chunk)
        file.write(chunk)
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
