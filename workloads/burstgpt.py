"""What does a BurstGPT trace say? CSV of requests to ChatGPT and GPT-4 at a campus (HPMLL)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import polars as pl

from workloads.errors import TraceError
from workloads.model import Trace, blocks_of, build_frame

FIRST_COLUMN = b"Timestamp,"
COLUMNS = ("Timestamp", "Request tokens", "Response tokens")
REMEDY = "give BurstGPT's columns: Timestamp,Model,Request tokens,Response tokens,..."


def read_burstgpt(data: bytes, path: Path, block_tokens: int = 512) -> Trace:
    """A trace from BurstGPT's CSV, of any of its releases; nothing is shared, as nothing is said.

    Times (s) are re-based to 0. Failed requests (0 tokens) are left out and counted in
    `transforms`. `Session ID`, where there is one, becomes the session, `Log Type` the class.
    """
    try:
        table = pl.read_csv(data, infer_schema=False)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise TraceError(f"{path}: not a readable CSV ({reason}); mend the file") from None
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise TraceError(f"{path}:1: column {missing[0]} is missing; {REMEDY}")
    numbers = table.select(
        pl.col(name).str.strip_chars().cast(pl.Float64, strict=False) for name in COLUMNS
    )
    _check(table, numbers, path)
    served = (numbers["Request tokens"] > 0) & (numbers["Response tokens"] > 0)
    failed = int((~served).sum())
    table, numbers = table.filter(served), numbers.filter(served)
    if table.is_empty():
        raise TraceError(f"{path}: no request that succeeded; give a trace with requests")
    stamps = numbers["Timestamp"].to_numpy()
    tokens = numbers["Request tokens"].to_numpy().astype(np.int64)
    blocks = blocks_of(tokens, block_tokens)
    extra = {
        name: table[column].replace("", None)
        for name, column in (("session", "Session ID"), ("class", "Log Type"))
        if column in table.columns
    }
    frame = build_frame(
        np.rint((stamps - stamps[0]) * 1e9) / 1e9,
        tokens,
        numbers["Response tokens"].to_numpy().astype(np.int64),
        pl.Series(np.arange(int(blocks.sum()), dtype=np.int64)),
        blocks,
        extra,
    )
    notes = (f"{failed} failed requests left out",) if failed else ()
    digest = hashlib.sha256(data).hexdigest()
    return Trace(frame, path.stem, digest, block_tokens, False, notes)


def _check(table: pl.DataFrame, numbers: pl.DataFrame, path: Path) -> None:
    """Raise TraceError for the first row that breaks a rule."""
    stamp = numbers["Timestamp"]
    rules = [
        ("Timestamp", ~stamp.is_finite().fill_null(False), "give seconds as a number"),
        ("Timestamp", (stamp.diff() < 0).fill_null(False), "it is before the row above; sort it"),
    ]
    for name in COLUMNS[1:]:
        value = numbers[name]
        is_count = (value >= 0) & (value == value.floor()) & value.is_finite()
        rules.append((name, ~is_count.fill_null(False), "give a whole number of tokens"))
    broken = [(bad.arg_max() or 0, name, remedy) for name, bad, remedy in rules if bad.any()]
    if broken:
        row, name, remedy = min(broken, key=lambda item: item[0])
        raise TraceError(f"{path}:{row + 2}: {name} is {table[name][row]!r}; {remedy}")
