"""How can a run be looked at while it is written, and what is left of it after a crash?

Beside the files of a run directory, which come at its end, a writer keeps `segments/`: run.json as
far as it is known, and numbered Arrow IPC files with the requests that ended since the last one,
their spans, and the samples. A replay writes what its recorder has, as it is, for a load generator
has no time to make frames: the reader does. Each file is complete before it takes its name, and
none is written twice. The writer holds a lock that the system lets go of whatever ends the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import time
from pathlib import Path
from typing import IO, Any

import msgspec
import polars as pl

from mooncake_bench import metrics
from mooncake_bench.records import (
    REQUESTS,
    SAMPLES,
    SPANS,
    RecordsError,
    RunInfo,
    conform,
    read_info,
)

if sys.platform != "win32":
    import fcntl

DIRECTORY = "segments"
RAW = ".msgpack"
EVERY_S = 0.3
"""At most so often is a segment written."""

_SCHEMAS: dict[str, dict[str, pl.DataType]] = {
    "requests": REQUESTS,
    "spans": SPANS,
    "samples": SAMPLES,
}


class SegmentWriter:
    """Appends to the segments of one run directory; `planned` is the number of its requests.

    An earlier run's segments there are removed. Raises RecordsError where nothing can be written.
    """

    def __init__(self, directory: Path, info: RunInfo, planned: int = 0) -> None:
        self.directory = directory / DIRECTORY
        self._number = 0
        self._last_s = 0.0
        try:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True)
            self._lock = _locked(self.directory / "lock")
            info = msgspec.structs.replace(info, client=info.client | {"planned": planned})
            _complete(self.directory / "run.json", msgspec.json.encode(info))
        except OSError as error:
            raise RecordsError(f"{directory}: cannot write the run ({error.strerror})") from error

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._last_s >= EVERY_S

    def append(self, **tables: pl.DataFrame) -> None:
        """Add rows of requests, spans and samples; a request's spans come with it."""
        self._number += 1
        self._last_s = time.monotonic()
        # Requests last: who sees them finds their spans.
        for name in ("samples", "spans", "requests"):
            frame = tables.get(name)
            if frame is None or not frame.height:
                continue
            path = self.directory / f"{name}-{self._number:07d}.arrow"
            partial = path.with_suffix(".partial")
            conform(frame, name).write_ipc(partial, compression="zstd")
            partial.replace(path)

    def append_raw(self, records: bytes) -> None:
        """Add what `replay.live_run.frames` can read."""
        self._number += 1
        self._last_s = time.monotonic()
        _complete(self.directory / f"records-{self._number:07d}{RAW}", records)

    def close(self, *, keep: bool = False) -> None:
        """Let go; the segments go too, now that the run's own files are there."""
        if self._lock is not None:
            self._lock.close()
        if not keep:
            shutil.rmtree(self.directory, ignore_errors=True)


@dataclasses.dataclass(slots=True)
class Tail:
    """What has been read of a run's segments so far; `refresh` reads what is new."""

    directory: Path
    info: RunInfo = dataclasses.field(init=False)
    frame: pl.DataFrame = dataclasses.field(init=False)
    """As of `metrics.per_request`."""
    samples: pl.DataFrame = dataclasses.field(init=False)
    seen: set[str] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        self.info = read_info(self.directory / DIRECTORY / "run.json")
        empty = {name: pl.DataFrame(schema=schema) for name, schema in _SCHEMAS.items()}
        self.frame = metrics.per_request(empty["requests"], empty["spans"])
        self.samples = empty["samples"]

    def refresh(self) -> bool:
        """Read new segments; says whether there were any. Raises RecordsError."""
        paths = (self.directory / DIRECTORY).iterdir()
        names = sorted(p.name for p in paths if p.suffix in (".arrow", RAW))
        new = [name for name in names if name not in self.seen]
        if not new:
            return False
        read = {kind: self._read(new, kind) for kind in _SCHEMAS}
        if raw := [name for name in new if name.endswith(RAW)]:
            read["requests"], read["spans"] = self._frames(raw)
        times = metrics.per_request(read["requests"], read["spans"])
        self.frame = pl.concat([self.frame, times], rechunk=len(self.seen) % 64 == 0)
        self.samples = pl.concat([self.samples, read["samples"]])
        self.seen.update(new)
        return True

    def spans(self, request: int) -> pl.DataFrame:
        """One request's spans."""
        if raw := sorted(name for name in self.seen if name.endswith(RAW)):
            return self._frames(raw)[1].filter(pl.col("request") == request)
        paths = sorted((self.directory / DIRECTORY).glob("spans-*.arrow"))
        if not paths:
            return pl.DataFrame(schema=SPANS)
        scans = pl.scan_ipc(paths).filter(pl.col("request") == request)
        return scans.collect().sort("start_s", maintain_order=True)

    def _frames(self, names: list[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Requests and spans of a replay's records."""
        from mooncake_bench.replay.live_run import frames  # It writes segments, and knows them.

        paths = [self.directory / DIRECTORY / name for name in names]
        try:
            return frames(self.directory / DIRECTORY, [path.read_bytes() for path in paths])
        except (OSError, msgspec.MsgspecError, pl.exceptions.PolarsError) as error:
            raise RecordsError(f"{paths[0]}: cannot be read ({_first_line(error)})") from error

    def _read(self, names: list[str], kind: str) -> pl.DataFrame:
        paths = [self.directory / DIRECTORY / n for n in names if n.startswith(f"{kind}-")]
        try:
            frames = [pl.read_ipc(path) for path in paths]
        except (OSError, pl.exceptions.PolarsError) as error:
            raise RecordsError(f"{paths[0]}: cannot be read ({_first_line(error)})") from error
        return pl.concat([pl.DataFrame(schema=_SCHEMAS[kind]), *frames])


def has_segments(directory: Path) -> bool:
    return (directory / DIRECTORY / "run.json").is_file()


def is_being_written(directory: Path) -> bool:
    """Does a live process hold the lock of the segments?"""
    path = directory / DIRECTORY / "lock"
    if sys.platform == "win32":
        with contextlib.suppress(OSError):
            newest = max(file.stat().st_mtime for file in path.parent.iterdir())
            return time.time() - newest < 10.0
        return False
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _locked(path: Path) -> IO[bytes]:
    file = path.open("wb")
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _complete(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _first_line(error: Any) -> str:
    return str(error).strip().split("\n", 1)[0]
