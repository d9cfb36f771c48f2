"""What is in this directory: a whole run, one being written, what a crash left, or none?"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from mooncake_bench import metrics, segments
from mooncake_bench.records import (
    EXTRAS,
    SAMPLES,
    SERVER_METRICS,
    SPANS,
    TBT_FILE,
    RecordsError,
    RunInfo,
    read_frame,
    read_info,
    read_object,
)
from mooncake_bench.segments import Tail

COMPLETE, RUNNING, INCOMPLETE = "complete", "running", "incomplete"
RUN_FILES = ("run.json", "requests.parquet", "segments/run.json")
GAPS_AT_ONCE = 10_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A run to look at. `frame` is of `metrics.per_request`; `version` changes with the content.

    `state` is COMPLETE, RUNNING or INCOMPLETE; of the latter two `frame` holds what has ended, and
    `summary` is of that.
    """

    directory: Path
    info: RunInfo
    frame: pl.DataFrame
    samples: pl.DataFrame
    state: str
    version: str
    summary: dict[str, Any]
    tail: Tail | None = field(default=None, repr=False)

    def spans(self, request: int) -> pl.DataFrame:
        """One request's spans, in time order; raises RecordsError."""
        path = self.directory / "spans.parquet"
        if self.tail is not None:
            return self.tail.spans(request)
        if not path.is_file():
            return pl.DataFrame(schema=SPANS)
        try:
            rows = pl.scan_parquet(path, glob=False).filter(pl.col("request") == request)
            return rows.select(list(SPANS)).collect().sort("start_s", maintain_order=True)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise RecordsError(_truncated(path, error)) from error

    def server_metrics(self) -> pl.DataFrame:
        """What was scraped of the server's /metrics; empty where nothing was."""
        found = self._extra("server_metrics")
        return pl.DataFrame(schema=SERVER_METRICS) if found is None else found.collect()

    def chunks(self, request: int) -> pl.DataFrame | None:
        """One request's rows of records.CHUNKS, in time order; None where none were recorded."""
        found = self._extra("chunks")
        if found is None:
            return None
        return found.filter(pl.col("request") == request).sort("start_s").collect()

    def reuse(self) -> pl.DataFrame | None:
        """How the uses of blocks lie apart (records.REUSE); None where that was not recorded."""
        found = self._extra("reuse")
        return None if found is None else found.collect()

    def _extra(self, name: str) -> pl.LazyFrame | None:
        """A table that only some runs have; a broken one is as if it were not there."""
        path = self.directory / f"{name}.parquet"
        if self.tail is None and path.is_file():
            with contextlib.suppress(OSError, pl.exceptions.PolarsError):
                scan = pl.scan_parquet(path, glob=False).select(list(EXTRAS[name]))
                if scan.collect_schema() == pl.Schema(EXTRAS[name]):
                    return scan
        return None


@dataclass(frozen=True, slots=True)
class Glance:
    """What can be said of a run without reading its requests."""

    info: RunInfo
    summary: dict[str, Any]
    state: str


def glance(directory: Path) -> Glance:
    """A whole run by its run.json and summary.json, any other by opening it. RecordsError."""
    if _is_live(directory):
        run = open_run(directory)
        return Glance(run.info, run.summary, run.state)
    info = read_info(directory / "run.json")
    for name in ("requests.parquet", "spans.parquet", "samples.parquet"):
        if not (directory / name).is_file():
            raise RecordsError(
                f"{directory / name}: no such file; the run was not written to its end"
            )
    return Glance(info, read_object(directory / "summary.json"), COMPLETE)


def is_run(directory: Path) -> bool:
    """Does it look like a run, whole or not?"""
    return any((directory / name).is_file() for name in RUN_FILES)


def open_run(directory: Path, before: Opened | None = None) -> Opened:
    """Open a run, or `before` again if nothing has changed. Raises RecordsError.

    Of a run that has no tbt.parquet yet (or an old one) it is computed, once, and kept there.
    """
    if _is_live(directory):
        return _open_segments(directory, before)
    version = _version(directory)
    if before is not None and before.version == version:
        return before
    info = read_info(directory / "run.json")
    requests = read_frame(directory / "requests.parquet", "requests")
    samples = read_frame(directory / "samples.parquet", "samples")
    frame = metrics.with_tbt(requests, _tbt(directory, requests))
    summary = read_object(directory / "summary.json")
    return Opened(directory, info, frame, samples, COMPLETE, version, summary)


def _is_live(directory: Path) -> bool:
    """Are its segments what counts: is it being written, or did it end before its files were?"""
    if not segments.has_segments(directory):
        return False
    final = directory / "run.json"
    if not final.is_file() or segments.is_being_written(directory):
        return True
    return (directory / "segments" / "run.json").stat().st_mtime > final.stat().st_mtime


def _open_segments(directory: Path, before: Opened | None) -> Opened:
    started = (directory / "segments" / "run.json").stat().st_mtime_ns
    is_running = segments.is_being_written(directory)
    tail = before.tail if before is not None else None
    if tail is None or before is None or not before.version.startswith(f"{started}/"):
        tail = Tail(directory)
    tail.refresh()
    state = RUNNING if is_running else INCOMPLETE
    version = f"{started}/{state}/{len(tail.seen)}"
    if before is not None and before.version == version:
        return before
    info = tail.info
    if not is_running:
        planned = info.client.get("planned")
        reason = (
            f"The run ended before its results were written: {tail.frame.height}"
            + (f" of {planned}" if planned else "")
            + " requests are known; run it again."
        )
        info = msgspec.structs.replace(
            info, valid=False, invalid_reasons=[*info.invalid_reasons, reason]
        )
    samples = tail.samples if tail.samples.width else pl.DataFrame(schema=SAMPLES)
    summary = metrics.summarise_frame(info, tail.frame, samples)
    return Opened(directory, info, tail.frame, samples, state, version, summary, tail)


def _version(directory: Path) -> str:
    """Of the files that a run is made of; their absence is one too."""
    marks = []
    for name in ("run.json", "requests.parquet", "spans.parquet", "samples.parquet"):
        try:
            stat = (directory / name).stat()
        except OSError:
            marks.append("-")
            continue
        marks.append(f"{stat.st_mtime_ns}:{stat.st_size}")
    return "/".join(marks)


# --- The table that spares a look at every token ------------------------------------------------


def _tbt(directory: Path, requests: pl.DataFrame) -> pl.DataFrame:
    kept, spans = directory / TBT_FILE, directory / "spans.parquet"
    with contextlib.suppress(OSError, pl.exceptions.PolarsError):
        # One of before the tables is another run's.
        if kept.stat().st_mtime_ns >= spans.stat().st_mtime_ns:
            return pl.read_parquet(kept, glob=False)
    try:
        times = pl.concat(_in_parts(requests, spans))
    except FileNotFoundError:
        raise RecordsError(f"{spans}: no such file; the run was not written to its end") from None
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RecordsError(_truncated(spans, error)) from error
    # A wish: a directory that cannot be written is read anew the next time.
    with contextlib.suppress(OSError):
        partial = kept.with_name(f".{TBT_FILE}.{os.getpid()}.partial")
        times.write_parquet(partial)
        partial.replace(kept)
    return times


def _truncated(path: Path, error: Exception) -> str:
    first = str(error).strip().split("\n", 1)[0]
    return f"{path}: truncated or not Parquet ({first}); run again to write it anew"


def _in_parts(requests: pl.DataFrame, path: Path) -> Iterator[pl.DataFrame]:
    """`metrics.request_tbt` of ranges of requests, so that never all gaps are in memory."""
    if not path.is_file():
        raise FileNotFoundError(path)
    scan = pl.scan_parquet(path, glob=False)
    steps = scan.group_by("request").agg(pl.col("steps").sum()).sort("request").collect()
    part = (steps["steps"].cum_sum() // GAPS_AT_ONCE).alias("part")
    edges = steps.with_columns(part).group_by("part").agg(
        pl.col("request").min().alias("low"), pl.col("request").max().alias("high")
    )  # fmt: skip  # One thought.
    yield metrics.request_tbt(requests.clear(), pl.DataFrame(schema=SPANS))
    for low, high in edges.sort("part").select("low", "high").iter_rows():
        inside = pl.col("request").is_between(low, high)
        yield metrics.request_tbt(
            requests.filter(inside), scan.filter(inside).select(list(SPANS)).collect()
        )
