"""What does a trace file say? Mooncake and Bailian JSONL and Azure CSV, checked; JSONL written."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl

from workloads import burstgpt, texts
from workloads.errors import TraceError
from workloads.model import (
    Floats,
    Ints,
    Trace,
    blocks_of,
    build_frame,
    check_block_tokens,
)

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
FORMATS = (
    "Mooncake JSONL ({...} a line), Azure CSV (" + ",".join(AZURE_COLUMNS) + "), BurstGPT CSV, "
    "Qwen-Bailian JSONL, ShareGPT JSON, JSONL prompts, or a directory of ServeGen clients"
)
BAILIAN_BLOCK_TOKENS = 16
ALIASES = {
    "timestamp": "created_time",
    "input_length": "input_tokens",
    "output_length": "output_tokens",
}
# No serving trace known to us brings more requests a second than this.
UNLIKELY_RPS = 1000.0
EPOCH_S, EPOCH_MS = 1e9, 1e11
LONGEST_MS = 366 * 86_400e3


class _Row(msgspec.Struct, gc=False):
    """A line as it stands; fields have aliases, so presence is checked afterwards."""

    timestamp: float | None = None
    created_time: float | None = None
    input_length: int | None = None
    input_tokens: int | None = None
    output_length: int | None = None
    output_tokens: int | None = None
    session_id: str | int | None = None
    delay: float | None = None
    class_: str | None = msgspec.field(default=None, name="class")
    # Qwen-Bailian's:
    chat_id: int | None = None
    parent_chat_id: int = -1
    type: str | None = None


class _IntRow(_Row, gc=False):
    hash_ids: list[int] | None = None


class _StringRow(_Row, gc=False):
    hash_ids: list[str] | None = None


_INT_ROWS = msgspec.json.Decoder(_IntRow)
_STRING_ROWS = msgspec.json.Decoder(_StringRow)


def read_trace(
    path: str | Path, *, block_tokens: int = 512, timestamp_unit: str | None = None
) -> Trace:
    """Read a trace file, its format found from its content.

    `timestamp_unit` ("ms" or "s") is for JSONL: without it milliseconds are assumed, and refused
    where they look like seconds. Raises TraceError, one line, for anything unusable.
    """
    path = Path(path)
    check_block_tokens(block_tokens)
    if timestamp_unit not in (None, "ms", "s"):
        raise TraceError(f"timestamp unit {timestamp_unit!r} is unknown; use ms or s")
    data = _content(path)
    start = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"{"):
        first_line = start.split(b"\n", 1)[0]
        if any(name in first_line for name in texts.PROMPT_KEYS):
            return texts.read_prompts(data, path, block_tokens, timestamp_unit)
        if b'"chat_id"' in first_line:
            return read_bailian(data, path)
        return read_mooncake(data, path, block_tokens, timestamp_unit)
    if start.startswith(b"["):
        return texts.read_conversations(data, path, block_tokens)
    if start.startswith(burstgpt.FIRST_COLUMN):
        return burstgpt.read_burstgpt(data, path, block_tokens)
    if start.startswith(AZURE_COLUMNS[0].encode()):
        return read_azure(data, path, block_tokens)
    raise TraceError(f"{path}: format not recognised; give {FORMATS}")


def _content(path: Path) -> bytes:
    """The file's bytes; TraceError where there are none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise TraceError(f"{path}: is a directory; name a trace file in it") from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror}); check the file") from None
    if not data.strip():
        raise TraceError(f"{path}: the file is empty; give {FORMATS}")
    return data


# --- Mooncake JSONL ---------------------------------------------------------------------------


def read_mooncake(
    data: bytes, path: Path, block_tokens: int = 512, timestamp_unit: str | None = None
) -> Trace:
    """A trace from Mooncake JSONL: timestamp, input_length, output_length, hash_ids a line."""
    lines = _Lines(data.removeprefix(b"\xef\xbb\xbf"), path)
    rows = _decode(lines)
    if not rows:
        raise TraceError(f"{path}: the file is empty; give {FORMATS}")
    if any(row.session_id is not None for row in rows):
        rows = _in_order(_with_times(rows, lines), lines)
    columns = {field: _column(rows, field, lines) for field in ALIASES}
    lists = [row.hash_ids for row in rows]
    if None in lists:
        row = lists.index(None)
        lines.fail(row, "hash_ids is missing; give one id per block of input")
    blocks = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
    _check_rows(columns, blocks, block_tokens, lines)
    arrival_s, notes = _seconds(columns["timestamp"], timestamp_unit, path)
    frame = build_frame(
        arrival_s,
        columns["input_length"].astype(np.int64),
        columns["output_length"].astype(np.int64),
        _ids(lists, lines),
        blocks,
        _turns(rows, 1.0 if timestamp_unit == "s" else 1e3),
    )
    return Trace(frame, path.stem, hashlib.sha256(data).hexdigest(), block_tokens, False, notes)


def _with_times(rows: list[Any], lines: _Lines) -> list[Any]:
    """Rows of sessions: a later turn may have a delay (ms) in place of a timestamp.

    Such a turn cannot go out before the one before it, so it gets that one's time.
    """
    latest: dict[str | int, float] = {}
    for number, row in enumerate(rows):
        stamp = row.timestamp if row.timestamp is not None else row.created_time
        if row.delay is not None and not (0.0 <= row.delay < np.inf):
            lines.fail(number, f"delay is {_number(row.delay)}; give milliseconds, 0 or more")
        if row.session_id is None:
            continue
        if stamp is None:
            if row.session_id not in latest or row.delay is None:
                what = "its session has no turn before it" if row.delay is not None else "no delay"
                lines.fail(
                    number,
                    f"timestamp is missing, and {what}; give a timestamp, or delay on later turns",
                )
            row.timestamp = stamp = latest[row.session_id]
        latest[row.session_id] = stamp
    return rows


def _in_order(rows: list[Any], lines: _Lines) -> list[Any]:
    """Sessions are often written one after another: sort by time, turns in their order."""
    if any(row.timestamp is None and row.created_time is None for row in rows):
        return rows  # To be named by who looks at the columns.
    stamps = [row.created_time if row.timestamp is None else row.timestamp for row in rows]
    lines.order = sorted(range(len(rows)), key=lambda number: stamps[number])
    return [rows[number] for number in lines.order]


def _turns(rows: list[Any], per_second: float) -> dict[str, list[Any]]:
    """The optional columns: sessions as text, delays in seconds, classes."""
    names = [None if row.session_id is None else str(row.session_id) for row in rows]
    delays = [None if row.delay is None else row.delay / per_second for row in rows]
    return {"session": names, "delay_s": delays, "class": [row.class_ for row in rows]}


def read_bailian(data: bytes, path: Path) -> Trace:
    """A trace from Qwen-Bailian JSONL: blocks of 16 tokens, seconds, turns linked by chat ids.

    Every row is a whole prompt at its own time; `type` becomes its class. Rows whose ids cover
    only whole blocks get one of their own for the rest.
    """
    lines = _Lines(data.removeprefix(b"\xef\xbb\xbf"), path)
    rows = _decode(lines)
    roots: dict[int, str] = {}
    fresh = 1 + max((one for row in rows for one in row.hash_ids or [0]), default=0)
    padded = 0
    for number, row in enumerate(rows):
        if row.chat_id is None:
            lines.fail(number, "chat_id is missing; give the request's number")
        row.session_id = roots.get(row.parent_chat_id, str(row.chat_id))
        roots[row.chat_id], row.class_ = row.session_id, row.type
        whole, rest = divmod(row.input_length or 0, BAILIAN_BLOCK_TOKENS)
        if row.hash_ids is not None and rest and len(row.hash_ids) == whole:
            row.hash_ids.append(fresh + padded)
            padded += 1
    rewritten = b"\n".join(msgspec.json.encode(row) for row in rows)
    trace = read_mooncake(rewritten, path, BAILIAN_BLOCK_TOKENS, "s")
    notes = (f"{padded} partial last blocks made unique",) if padded else ()
    return replace(
        trace, sha256=hashlib.sha256(data).hexdigest(), transforms=trace.transforms + notes
    )


class _Lines:
    """The lines of a file, looked at one by one only when an error must be placed."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data = data
        self.path = path
        self.order: list[int] | None = None
        """Which row of the file stands where, if they were sorted."""

    def fail(self, row: int, message: str) -> None:
        """Raise TraceError for the row (0-based, blank lines not counted)."""
        filled = [n for n, line in enumerate(self.data.split(b"\n"), 1) if line.strip()]
        row = self.order[row] if self.order is not None else row
        raise TraceError(f"{self.path}:{filled[row]}: {message}")


def _decode(lines: _Lines) -> list[Any]:
    """All rows, typed; on failure the first bad line is found and named."""
    for decoder in (_INT_ROWS, _STRING_ROWS):
        try:
            return decoder.decode_lines(lines.data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    filled = (line for line in lines.data.split(b"\n") if line.strip())
    kinds: set[type] = set()
    for row, line in enumerate(filled):
        problem = _line_problem(line, kinds)
        if problem:
            lines.fail(row, problem)
    raise TraceError(f"{lines.path}: not readable as JSON, one object a line; give {FORMATS}")


def _line_problem(line: bytes, kinds: set[type]) -> str | None:
    """What is wrong with one line, or None; `kinds` collects the types of ids seen so far."""
    try:
        row = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if any(word in line for word in (b"NaN", b"nan", b"Infinity", b"inf")):
            return "a value is NaN or infinite, which JSON does not know; give a finite number"
        if "out of range" in str(error):
            return "a number is too large to be finite; give a finite number"
        return "not valid JSON (cut off?); give one complete object a line"
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__}, not an object; give {{...}} with {', '.join(ALIASES)}"
    for field, alias in ALIASES.items():
        for name in (field, alias):
            wanted = (int, float) if field == "timestamp" else (int,)
            value = row.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, wanted)):
                return f"{name} is {_shown(value)}; give {_WANTED[field]}"
    ids = row.get("hash_ids")
    if ids is not None and not isinstance(ids, list):
        return f"hash_ids is {_shown(ids)}; give a list of ids, one per block"
    kinds.update(map(type, ids or []))
    if kinds - {int, str}:
        return "hash_ids holds something that is no id; give integers of 64 bits, or strings"
    if len(kinds) > 1:
        return "hash_ids mixes numbers and strings; write all ids of the file in one way"
    return None


_WANTED = {
    "timestamp": "milliseconds as a number",
    "input_length": "a whole number of tokens, 1 or more",
    "output_length": "a whole number of tokens, 1 or more",
}


def _shown(value: Any) -> str:
    """A value for a message: short, on one line."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _column(rows: list[Any], field: str, lines: _Lines) -> npt.NDArray[Any]:
    """One field of every row, by its own name or its alias; TraceError where both are missing."""
    alias = ALIASES[field]
    values = [getattr(row, field) for row in rows]
    if None in values:
        values = [
            getattr(row, alias) if value is None else value
            for row, value in zip(rows, values, strict=True)
        ]
    if None in values:
        lines.fail(values.index(None), f"{field} (or {alias}) is missing; give {_WANTED[field]}")
    try:
        return np.array(values, dtype=np.float64 if field == "timestamp" else np.int64)
    except OverflowError:
        row = next(row for row, value in enumerate(values) if abs(value) >= 2**63)
        lines.fail(row, f"{field} is {_shown(values[row])}; give {_WANTED[field]}")
        raise  # for the type checker: fail() always raises


def _check_rows(columns: dict[str, Any], blocks: Ints, block_tokens: int, lines: _Lines) -> None:
    """Raise TraceError for the first row that breaks a rule."""
    timestamp = columns["timestamp"]
    tokens_in, tokens_out = columns["input_length"], columns["output_length"]
    earlier = np.concatenate((timestamp[:1], timestamp[:-1]))
    want = blocks_of(tokens_in, block_tokens)
    # In order of explanation: a row that breaks several rules is explained by its first.
    rules = (
        (~np.isfinite(timestamp), "timestamp is {t}; give a finite number of milliseconds"),
        (timestamp < 0, "timestamp is {t}, negative; count from 0 at the trace's start"),
        (timestamp < earlier, "timestamp {t} is before the row above ({e}); sort by timestamp"),
        (
            timestamp - timestamp[0] > LONGEST_MS,
            "timestamp {t} is more than a year after the first row; give milliseconds",
        ),
        (tokens_in < 1, "input_length is {i}; every request needs 1 token or more"),
        (tokens_out < 1, "output_length is {o}; every request needs 1 token or more"),
        (
            blocks != want,
            "hash_ids has {h} ids, but {i} tokens in blocks of {b} need {w};"
            " mend the row, or set the block size the trace was made with",
        ),
    )
    broken = [(int(np.argmax(bad)), text) for bad, text in rules if bad.any()]
    if broken:
        row, text = min(broken, key=lambda item: item[0])
        values = {"t": _number(timestamp[row]), "e": _number(earlier[row]), "i": tokens_in[row]}
        values |= {"o": tokens_out[row], "h": blocks[row], "b": block_tokens, "w": want[row]}
        lines.fail(row, text.format(**values))


def _number(value: float) -> str:
    """A timestamp as the file would write it: no needless decimals."""
    return f"{value:.0f}" if float(value).is_integer() and value < 1e15 else f"{value:g}"


def _seconds(timestamp: Floats, unit: str | None, path: Path) -> tuple[Floats, tuple[str, ...]]:
    """Arrivals in seconds on a nanosecond grid, and a note where wall-clock times were re-based.

    The grid makes reading, writing and reading again give the same floats.
    """
    first, span = float(timestamp[0]), float(timestamp[-1] - timestamp[0])
    rate = len(timestamp) / (span / 1e3) if span else 0.0
    crowded = len(timestamp) >= 100 and rate > UNLIKELY_RPS
    if unit is None and (crowded or EPOCH_S <= first < EPOCH_MS):
        why = f"{rate:.0f} requests/s" if crowded else f"they start at {_number(first)}"
        raise TraceError(
            f"{path}: timestamps look like seconds ({why} if they were milliseconds);"
            " multiply them by 1000, or name the unit: timestamp unit s (or ms if it is meant)"
        )
    per_second = 1e3 if unit != "s" else 1.0
    notes: tuple[str, ...] = ()
    if first / per_second >= EPOCH_S or first >= EPOCH_MS:
        timestamp = timestamp - first
        notes = ("wall-clock timestamps re-based to 0",)
    return np.rint(timestamp * (1e9 / per_second)) / 1e9, notes


def _ids(lists: list[list[Any]], lines: _Lines) -> pl.Series:
    """All ids in one flat series: Int64, UInt64 or String, whichever holds them whole."""
    flat = list(chain.from_iterable(lists))
    if isinstance(flat[0], str):
        return pl.Series(flat, dtype=pl.String)
    for dtype in (np.int64, np.uint64):
        try:
            return pl.Series(np.array(flat, dtype=dtype))
        except OverflowError:
            continue
    low, high = (-(2**63), 2**63) if min(flat) < 0 else (0, 2**64)
    for row, ids in enumerate(lists):
        for value in ids:
            if not low <= value < high:
                lines.fail(row, f"hash_ids has {value}, over 64 bits; write the ids as strings")
    raise AssertionError("ids overflow, yet every one fits")


def write_mooncake(trace: Trace, path: str | Path) -> None:
    """Write a trace as Mooncake JSONL (timestamps in ms, to the nanosecond).

    The file appears under its name only when complete. Raises TraceError where it cannot be
    written. Reading it back gives the same frame.
    """
    path = Path(path)
    # A neighbour file and a rename, so that a full disk never leaves half a trace.
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    encode = msgspec.json.encode
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            for _, arrival_s, tokens_in, tokens_out, ids, *extra in trace.frame.iter_rows():
                row = {"timestamp": _milliseconds(arrival_s), "input_length": tokens_in}
                row |= {"output_length": tokens_out, "hash_ids": ids}
                row |= _written(dict(zip(trace.frame.columns[5:], extra, strict=True)))
                file.write(encode(row) + b"\n")
        partial.replace(path)
    except OSError as error:
        if partial.exists():
            partial.unlink()
        raise TraceError(f"{path}: cannot be written ({error.strerror}); check the path") from None


def _written(extra: dict[str, Any]) -> dict[str, Any]:
    """A row's optional columns under the names that are read."""
    row: dict[str, Any] = {}
    if extra.get("session") is not None:
        row["session_id"] = extra["session"]
    if extra.get("delay_s") is not None:
        row["delay"] = _milliseconds(extra["delay_s"])
    if extra.get("class") is not None:
        row["class"] = extra["class"]
    if extra.get("prompt") is not None:
        prompt = msgspec.json.decode(extra["prompt"])
        row["prompt" if isinstance(prompt, str) else "messages"] = prompt
    return row


def _milliseconds(arrival_s: float) -> int | float:
    """Seconds as milliseconds on the nanosecond grid, whole numbers as int."""
    nanoseconds = round(arrival_s * 1e9)
    return nanoseconds // 10**6 if nanoseconds % 10**6 == 0 else nanoseconds / 1e6


# --- Azure CSV --------------------------------------------------------------------------------


def read_azure(data: bytes, path: Path, block_tokens: int = 512) -> Trace:
    """A trace from Azure's CSV: TIMESTAMP, ContextTokens, GeneratedTokens; no shared prefixes.

    Times are re-based to 0. Every block gets a fresh id, so that nothing is shared.
    """
    table = _azure_table(data, path)
    arrival = table.select(
        pl.col("TIMESTAMP")
        .str.replace(r"(Z|[+-]\d\d:?\d\d)$", "")
        .str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="ns", strict=False)
        .dt.epoch("ns")
    )["TIMESTAMP"]
    tokens = {
        name: table[name].str.strip_chars().cast(pl.Int64, strict=False)
        for name in AZURE_COLUMNS[1:]
    }
    _check_azure(table, arrival, tokens, path)
    nanoseconds = arrival.to_numpy()
    input_tokens = tokens["ContextTokens"].to_numpy()
    blocks = blocks_of(input_tokens, block_tokens)
    frame = build_frame(
        (nanoseconds - nanoseconds[0]) / 1e9,
        input_tokens,
        tokens["GeneratedTokens"].to_numpy(),
        pl.Series(np.arange(int(blocks.sum()), dtype=np.int64)),
        blocks,
    )
    return Trace(frame, path.stem, hashlib.sha256(data).hexdigest(), block_tokens)


def _azure_table(data: bytes, path: Path) -> pl.DataFrame:
    """The CSV as strings; TraceError where it is no such table."""
    try:
        table = pl.read_csv(data, infer_schema=False)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise TraceError(f"{path}: not a readable CSV ({reason}); mend the file") from None
    missing = [name for name in AZURE_COLUMNS if name not in table.columns]
    if missing:
        raise TraceError(f"{path}:1: column {missing[0]} is missing; give {FORMATS}")
    if table.is_empty():
        raise TraceError(f"{path}: a header and no rows; give a trace with requests")
    return table


def _check_azure(
    table: pl.DataFrame, arrival: pl.Series, tokens: dict[str, pl.Series], path: Path
) -> None:
    """Raise TraceError for the first row that breaks a rule."""
    rules = [
        ("TIMESTAMP", arrival.is_null(), "give a time like 2023-11-16 18:15:46.68"),
        (
            "TIMESTAMP",
            (arrival.diff() < 0).fill_null(False),
            "it is before the row above; sort by TIMESTAMP",
        ),
    ]
    rules += [
        (name, (column < 1).fill_null(True), "give a whole number of tokens, 1 or more")
        for name, column in tokens.items()
    ]
    broken = [(bad.arg_max() or 0, name, remedy) for name, bad, remedy in rules if bad.any()]
    if broken:
        row, name, remedy = min(broken, key=lambda item: item[0])
        raise TraceError(f"{path}:{row + 2}: {name} is {_shown(table[name][row])}; {remedy}")
