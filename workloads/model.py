"""What is a trace here? One frame of requests, and where it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from workloads.errors import TraceError

COLUMNS = ("request", "arrival_s", "input_tokens", "output_tokens", "hash_ids")
OPTIONAL: dict[str, pl.DataType] = {
    "session": pl.String(),  # requests of one are turns of one conversation; null: alone
    "delay_s": pl.Float64(),  # from the previous turn's end; null: at its own arrival time
    "class": pl.String(),  # by which SLOs can differ
    "prompt": pl.String(),  # as JSON, text or messages; null: made from the block ids
}
"""Columns that only some traces have, after COLUMNS and in this order."""
FEW_IDS = 100_000
"""Are cut in Python: to group them brings in 6 MB more of polars, which a load generator keeps."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Random = np.random.Generator


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival, with the block ids that say which prefixes they share.

    `frame` has the columns request Int64 (0.. row number), arrival_s Float64 (>= 0,
    non-decreasing), input_tokens Int64 (>= 1), output_tokens Int64 (>= 1) and hash_ids
    List(Int64 | UInt64 | String), one id a block: `ceil(input_tokens / block_tokens)` of them.
    Columns of OPTIONAL may follow.
    `sha256` is that of the source file's bytes, or of a generator's name, parameters and seed.
    """

    frame: pl.DataFrame
    name: str
    sha256: str
    block_tokens: int
    jittered: bool = False
    transforms: tuple[str, ...] = ()

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last."""
        arrival_s = self.frame["arrival_s"]
        return float(arrival_s[-1] - arrival_s[0])

    @property
    def rate_rps(self) -> float:
        """Requests a second over `duration_s`; 0 where all arrive at one instant."""
        return self.frame.height / self.duration_s if self.duration_s > 0 else 0.0

    def changed(self, frame: pl.DataFrame, what: str, *, jittered: bool | None = None) -> Trace:
        """This trace with another frame, its rows renumbered, and `what` added to transforms."""
        return replace(
            self,
            frame=with_row_numbers(frame),
            jittered=self.jittered if jittered is None else jittered,
            transforms=(*self.transforms, what),
        )


def with_row_numbers(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with `request` as its row numbers, columns in their order."""
    numbers = pl.int_range(pl.len(), dtype=pl.Int64).alias("request")
    extra = [name for name in OPTIONAL if name in frame.columns]
    return frame.with_columns(numbers).select(*COLUMNS, *extra)


def build_frame(
    arrival_s: Sequence[float] | Floats,
    input_tokens: Sequence[int] | Ints,
    output_tokens: Sequence[int] | Ints,
    ids: pl.Series,
    blocks: Ints,
    extra: Mapping[str, Sequence[Any] | pl.Series] | None = None,
) -> pl.DataFrame:
    """The frame of a trace from its columns; `ids` is flat, `blocks` its share per request.

    `extra` has columns of OPTIONAL; those with nothing but nulls are left out.
    """
    frame = pl.DataFrame(
        {
            "arrival_s": pl.Series(arrival_s, dtype=pl.Float64),
            "input_tokens": pl.Series(input_tokens, dtype=pl.Int64),
            "output_tokens": pl.Series(output_tokens, dtype=pl.Int64),
            "hash_ids": nested(ids, blocks),
        }
    )
    for name, values in (extra or {}).items():
        column = pl.Series(name, values, dtype=OPTIONAL[name])
        if column.null_count() < len(column):
            frame = frame.with_columns(column)
    return with_row_numbers(frame)


def nested(ids: pl.Series, blocks: Ints) -> pl.Series:
    """A flat series of ids cut into one list a request (each of at least one block)."""
    if len(ids) < FEW_IDS:
        values, ends = ids.to_list(), np.cumsum(blocks).tolist()
        lists = [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        return pl.Series("hash_ids", lists, dtype=pl.List(ids.dtype))
    rows = np.repeat(np.arange(len(blocks)), blocks)
    flat = pl.DataFrame({"row": rows, "hash_ids": ids})
    return flat.group_by("row", maintain_order=True).agg("hash_ids")["hash_ids"]


def flat_codes(trace: Trace) -> tuple[Ints, Ints]:
    """Dense codes (0.. in order of first use) of all ids in row order, and each row's start.

    Returns `(codes, starts)`; row i owns `codes[starts[i]:starts[i + 1]]`.
    """
    lists = trace.frame["hash_ids"]
    starts = np.concatenate(([0], lists.list.len().to_numpy().cumsum())).astype(np.int64)
    return first_use_codes(lists.explode().to_numpy()), starts


def first_use_codes(values: npt.NDArray[Any]) -> Ints:
    """Equal values as equal numbers 0, 1, ... in the order in which they first appear."""
    unique, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    rank = np.empty(len(unique), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(unique))
    return rank[inverse]


def blocks_of(input_tokens: Any, block_tokens: int) -> Any:
    """Blocks that hold so many tokens: ceil(input_tokens / block_tokens), whole arrays too."""
    return -(-input_tokens // block_tokens)


def check_block_tokens(block_tokens: int) -> None:
    """Raise TraceError unless the block size is usable."""
    if block_tokens < 1:
        raise TraceError(f"block_tokens is {block_tokens}; use a positive size, 512 as in Mooncake")


def seeded(seed: int) -> Random:
    """Random numbers fixed by a seed (>= 0); callers use `random()` alone, stable in numpy."""
    if seed < 0:
        raise TraceError(f"seed {seed} is negative; give 0 or more")
    return np.random.Generator(np.random.PCG64(seed))
