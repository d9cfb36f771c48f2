"""Who may look at a replay while it goes on? Whoever opens its directory: see segments.py."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mooncake_bench.records import RunInfo
from mooncake_bench.replay.assemble import build_frames
from mooncake_bench.replay.client import Progress
from mooncake_bench.replay.recorder import Batch
from mooncake_bench.replay.schedule import Plan
from mooncake_bench.segments import SegmentWriter


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
        self._whole = whole
        self._behind = behind
        self._fresh: list[Batch] = []

    def look(self, progress: Progress, batch: Batch | None) -> str:
        self.add(batch)
        return self._behind.look(progress, batch) if self._behind is not None else ""

    def add(self, batch: Batch | None) -> None:
        """Take a batch, or none; now and then all that is new becomes a segment."""
        if batch is not None:
            self._fresh.append(batch)
        if self._fresh and self._writer.is_due:
            requests, spans = build_frames(self._whole, self._fresh)
            self._fresh = []
            self._writer.append(requests=requests, spans=spans)

    def close(self, *, keep: bool = False) -> None:
        """The run has ended; without `keep` its own files are there, and the segments go."""
        self._writer.close(keep=keep)
