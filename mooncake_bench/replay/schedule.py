"""When is request i sent, and by which worker?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows one worker sends, in order of release; arrays of equal length.

    `request` is the row number in the trace, `due_s` the release time in seconds from the start of
    the run. Lengths are in tokens; `hash_ids` holds one sequence of block ids a row.
    """

    request: Ints
    due_s: Floats
    input_tokens: Ints
    output_tokens: Ints
    hash_ids: pl.Series

    def __len__(self) -> int:
        return len(self.request)

    def blocks(self, row: int) -> Any:
        """Block ids of the row at position `row`, as a list."""
        return self.hash_ids[row].to_list()


def release_times(arrival_s: Floats, speed: float) -> Floats:
    """Release times in seconds from the start: the trace's own, `speed` times as dense."""
    assert speed > 0.0
    return arrival_s / speed


def share(rows: int, worker: int, workers: int) -> Ints:
    """Positions of the rows that belong to `worker` of `workers`: row i to worker i % workers."""
    assert 0 <= worker < workers
    return np.arange(worker, rows, workers, dtype=np.int64)


def plan(frame: pl.DataFrame, speed: float, worker: int = 0, workers: int = 1) -> Plan:
    """The share of `worker` in the frame of a Trace, released `speed` times as fast."""
    mine = frame[share(frame.height, worker, workers)]
    return Plan(
        request=mine["request"].to_numpy().astype(np.int64),
        due_s=release_times(mine["arrival_s"].to_numpy().astype(np.float64), speed),
        input_tokens=mine["input_tokens"].to_numpy().astype(np.int64),
        output_tokens=mine["output_tokens"].to_numpy().astype(np.int64),
        hash_ids=mine["hash_ids"],
    )
