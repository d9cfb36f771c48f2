"""Who may look at a replay while it goes on? Whoever opens its directory: see segments.py."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import polars as pl

from mooncake_bench.records import RecordsError, RunInfo
from mooncake_bench.replay.assemble import build_frames
from mooncake_bench.replay.client import Progress
from mooncake_bench.replay.recorder import Batch
from mooncake_bench.replay.schedule import Plan
from mooncake_bench.replay.target import Target, fetch_samples
from mooncake_bench.segments import SegmentWriter

SAMPLES_EVERY_S = 2.0
SAMPLES_PATIENCE_S = 1.0
"""A cluster too busy to answer is asked again the next time."""
PLAN = "plan.npz"
PLANNED = ("request", "due_s", "input_tokens", "output_tokens")


class Monitor(Protocol):
    """Looks at a run while it goes on."""

    def look(self, progress: Progress, batch: Batch | None) -> str:
        """Called a few times a second with what is new; the reason to end the run, or ""."""


class LiveRun:
    """Writes what has ended to the segments of a run's directory; `whole` is the trace's plan.

    A monitor itself, in front of `behind`, if there is one. Raises RecordsError.
    """

    def __init__(
        self, directory: Path, info: RunInfo, whole: Plan, behind: Monitor | None = None
    ) -> None:
        self._writer = SegmentWriter(directory, info, len(whole))
        write_plan(whole, self._writer.directory)
        self._behind = behind
        self._fresh: list[Batch] = []
        self._cluster: tuple[Target, float] | None = None
        self._sampled_s = -1.0
        self._sample_at_s = 0.0

    def follow(self, target: Target, start: float) -> None:
        """The run has begun, at `start` of time.perf_counter(): its samples are asked for too."""
        self._cluster = target, start

    def look(self, progress: Progress, batch: Batch | None) -> str:
        self.add(batch)
        return self._behind.look(progress, batch) if self._behind is not None else ""

    def add(self, batch: Batch | None) -> None:
        """Take a batch, or none; now and then all that is new becomes a segment.

        So do the cluster's samples, where there is a cluster.
        """
        if batch is not None:
            self._fresh.append(batch)
        if self._fresh and self._writer.is_due:
            self._writer.append_raw(msgspec.msgpack.encode(self._fresh))
            self._fresh = []
        if self._cluster is not None and time.monotonic() >= self._sample_at_s:
            # Set before it is asked: under Locust others come in here while the answer is awaited.
            self._sample_at_s = time.monotonic() + SAMPLES_EVERY_S
            self._add_samples(*self._cluster)

    def _add_samples(self, target: Target, start: float) -> None:
        fresh = fetch_samples(target, start, self._sampled_s, SAMPLES_PATIENCE_S)
        if fresh.height:
            self._sampled_s = fresh["time_s"][-1]
            self._writer.append(samples=fresh)

    def close(self, *, keep: bool = False) -> None:
        """The run has ended; without `keep` its own files are there, and the segments go."""
        self._writer.close(keep=keep)


def write_plan(whole: Plan, directory: Path) -> None:
    """What the records do not say themselves; raises RecordsError."""
    columns = {name: getattr(whole, name) for name in PLANNED}
    if whole.classes is not None:
        columns["classes"] = whole.classes.to_numpy().astype(str)
    try:
        np.savez(directory / PLAN, **columns)
    except OSError as error:
        raise RecordsError(f"{directory}: cannot write the run ({error.strerror})") from error


def frames(directory: Path, segments: Sequence[bytes]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Requests and spans of the records in segments; raises OSError, msgspec's or polars'."""
    with np.load(directory / PLAN, allow_pickle=False) as columns:
        request, due_s, input_tokens, output_tokens = (columns[name] for name in PLANNED)
        classes = pl.Series(columns["classes"]) if "classes" in columns else None
    whole = Plan(
        request,
        due_s,
        input_tokens,
        output_tokens,
        hash_ids=pl.Series([], dtype=pl.Null),
        classes=classes,
    )
    batches = [one for raw in segments for one in msgspec.msgpack.decode(raw, type=list[Batch])]
    return build_frames(whole, batches)
