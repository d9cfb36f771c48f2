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
    the run (of a row with a previous turn: no earlier than this). Lengths are in tokens; `hash_ids`
    holds one sequence of block ids a row.
    """

    request: Ints
    due_s: Floats
    input_tokens: Ints
    output_tokens: Ints
    hash_ids: pl.Series
    after: Ints | None = None
    """Position in the plan of the previous turn of the session, -1 where there is none."""
    pause_s: Floats | None = None
    """From the end of that turn to the release of this one, where `after` is not -1."""
    classes: pl.Series | None = None
    """The class of each request, by which its SLO is chosen; null where it has none."""
    prompts: pl.Series | None = None
    """The prompt as JSON (a string, or a list of messages); null where the block ids make it."""

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


def plan(
    frame: pl.DataFrame,
    speed: float,
    worker: int = 0,
    workers: int = 1,
    *,
    waits_for_answers: bool = True,
) -> Plan:
    """The share of `worker` in the frame of a Trace, released `speed` times as fast.

    Sessions stay whole: all turns belong to the worker of the first. Their pauses are people's, so
    the speed does not change them. With `waits_for_answers` False turns go out at their own times.
    """
    linked = waits_for_answers and {"session", "delay_s"} <= set(frame.columns)
    mine = frame[
        share_of_sessions(frame, worker, workers)
        if linked
        else share(frame.height, worker, workers)
    ]
    return Plan(
        request=mine["request"].to_numpy().astype(np.int64),
        due_s=release_times(mine["arrival_s"].to_numpy().astype(np.float64), speed),
        input_tokens=mine["input_tokens"].to_numpy().astype(np.int64),
        output_tokens=mine["output_tokens"].to_numpy().astype(np.int64),
        hash_ids=mine["hash_ids"],
        after=previous_turns(mine) if linked else None,
        pause_s=mine["delay_s"].fill_null(0.0).to_numpy().astype(np.float64) if linked else None,
        classes=mine["class"] if "class" in mine.columns else None,
        prompts=mine["prompt"] if "prompt" in mine.columns else None,
    )


def previous_turns(frame: pl.DataFrame) -> Ints:
    """The position of each row's previous turn in the frame; -1 where it waits for none.

    A row waits if it has a delay and an earlier row of its session is in the frame.
    """
    position = pl.int_range(pl.len(), dtype=pl.Int64)
    before = position.shift(1).over("session")
    waits = pl.col("session").is_not_null() & pl.col("delay_s").is_not_null()
    column = frame.select(pl.when(waits).then(before).fill_null(-1).alias("after"))["after"]
    return column.to_numpy().astype(np.int64)


def share_of_sessions(frame: pl.DataFrame, worker: int, workers: int) -> Ints:
    """Positions of the rows that belong to `worker`: session j, by first row, to j % workers."""
    assert 0 <= worker < workers
    names = frame["session"].to_list()
    order: dict[object, int] = {}
    for row, name in enumerate(names):
        order.setdefault(row if name is None else name, len(order))
    owner = (order[row if name is None else name] % workers for row, name in enumerate(names))
    return np.flatnonzero(np.fromiter(owner, dtype=np.int64) == worker).astype(np.int64)
