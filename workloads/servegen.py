"""What load do ServeGen's clients make? Rates, arrival processes and lengths of each, summed up.

A directory of `chunk-N-trace.csv` (no header; a window a line: start s, requests/s, CV of the
gaps, Gamma or Weibull, its shape, its scale) and `chunk-N-dataset.json` ({start s: {"input_tokens":
distribution, "output_tokens": distribution}}, written as Python dicts of tokens to probability).
"""

from __future__ import annotations

import ast
import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from workloads.arrivals import gamma_draws
from workloads.errors import TraceError
from workloads.model import Floats, Ints, Random, Trace, blocks_of, build_frame, seeded

TRACE_NAME = re.compile(r"chunk-(\d+)-trace\.csv")
LAST_WINDOW_S = 600.0
PARAMETERS = ("start_s", "duration_s", "rate_rps")


@dataclass(frozen=True, slots=True)
class _Window:
    """One line of a client's trace; `end_s` is the next line's start."""

    start_s: float
    end_s: float
    rate_rps: float
    shape: float
    is_weibull: bool


def read_clients(
    directory: str | Path, *, seed: int = 0, block_tokens: int = 512, **parameters: float
) -> Trace:
    """A trace drawn from the clients in `directory`, nothing shared between prompts.

    `start_s` (0) and `duration_s` (600) choose the part of their day; `rate_rps` scales all of
    them to this rate together (default: their own). Each request's class is its client, as
    "client-3". Raises TraceError, one line.
    """
    unknown = [name for name in parameters if name not in PARAMETERS]
    if unknown:
        raise TraceError(f"{directory}: no parameter {unknown[0]!r}; use {', '.join(PARAMETERS)}")
    start_s, duration_s = parameters.get("start_s", 0.0), parameters.get("duration_s", 600.0)
    if not (start_s >= 0.0 and 0.0 < duration_s < float("inf")):
        raise TraceError(f"{directory}: start_s must be 0 or more, duration_s above 0")
    files = _files(Path(directory))
    clients = {number: _windows(path, start_s, start_s + duration_s) for number, path in files}
    own_rps = (
        sum(
            window.rate_rps * (window.end_s - window.start_s)
            for windows in clients.values()
            for window in windows
        )
        / duration_s
    )
    if not own_rps > 0.0:
        raise TraceError(f"{directory}: no client sends anything in that part; change start_s")
    factor = parameters.get("rate_rps", own_rps) / own_rps
    if not factor > 0.0:
        raise TraceError(f"{directory}: rate_rps must be above 0")
    random = seeded(seed)
    parts: list[pl.DataFrame] = []
    for number, path in files:
        if not clients[number]:
            continue
        lengths = _Lengths(path.with_name(f"chunk-{number}-dataset.json"))
        parts.extend(_draw(number, window, lengths, factor, random) for window in clients[number])
    table = pl.concat(parts).sort("arrival_s", maintain_order=True)
    if table.is_empty():
        raise TraceError(f"{directory}: no request was drawn; give a longer duration_s")
    note = f"drawn from {len(files)} clients, {start_s:g}-{start_s + duration_s:g} s, seed {seed}"
    return _trace(table, Path(directory), block_tokens, start_s, _digest(files, note), note)


def _trace(
    table: pl.DataFrame, path: Path, block_tokens: int, start_s: float, digest: str, note: str
) -> Trace:
    tokens = table["input_tokens"].to_numpy()
    blocks = blocks_of(tokens, block_tokens)
    frame = build_frame(
        np.rint((table["arrival_s"].to_numpy() - start_s) * 1e9) / 1e9,
        tokens,
        table["output_tokens"].to_numpy(),
        pl.Series(np.arange(int(blocks.sum()), dtype=np.int64)),
        blocks,
        {"class": table["client"]},
    )
    return Trace(frame, path.name, digest, block_tokens, False, (note,))


def _files(directory: Path) -> list[tuple[int, Path]]:
    found = [
        (int(match[1]), path)
        for path in directory.iterdir()
        if (match := TRACE_NAME.fullmatch(path.name))
    ]
    if not found:
        raise TraceError(f"{directory}: no chunk-N-trace.csv in it; name a trace file instead")
    return sorted(found)


def _windows(path: Path, start_s: float, end_s: float) -> list[_Window]:
    """The client's windows in the part asked for, those in which it sends something."""
    rows: list[tuple[float, float, str, float]] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            begin, rate, _, kind, shape, _ = line.split(",")
            rows.append((float(begin), float(rate), kind, float(shape)))
        except ValueError:
            raise TraceError(
                f"{path}:{number}: {line[:40]!r} is no window; give start,rate,cv,name,shape,scale"
            ) from None
        if kind not in ("", "Gamma", "Weibull"):
            raise TraceError(f"{path}:{number}: arrivals {kind!r} unknown; give Gamma or Weibull")
    ends = [row[0] for row in rows[1:]] + ([rows[-1][0] + LAST_WINDOW_S] if rows else [])
    windows = []
    for (window_s, rate_rps, name, form), end in zip(rows, ends, strict=True):
        first, last = max(window_s, start_s), min(end, end_s)
        if name and rate_rps > 0.0 and form > 0.0 and first < last:
            windows.append(_Window(first, last, rate_rps, form, name == "Weibull"))
    return windows


class _Lengths:
    """A client's distributions of tokens, by window."""

    def __init__(self, path: Path) -> None:
        try:
            found: dict[str, dict[str, Any]] = msgspec.json.decode(path.read_bytes())
            self._windows = sorted((float(start), fields) for start, fields in found.items())
        except (OSError, msgspec.DecodeError, ValueError, AttributeError):
            raise TraceError(f"{path}: missing or no JSON; give the client's dataset") from None
        self._path = path
        self._known: dict[tuple[float, str], tuple[Ints, Floats]] = {}

    def draw(self, field: str, at_s: float, count: int, random: Random) -> Ints:
        """`count` lengths in tokens, at least 1, of the last window that has begun by then."""
        values, cumulated = self._distribution(field, at_s)
        chosen = np.searchsorted(cumulated, random.random(count) * cumulated[-1], side="right")
        lengths: Ints = np.maximum(values[np.minimum(chosen, len(values) - 1)], 1)
        return lengths

    def _distribution(self, field: str, at_s: float) -> tuple[Ints, Floats]:
        begun = [one for one in self._windows if one[0] <= at_s] or self._windows[:1]
        for start, fields in reversed(begun):
            if (start, field) in self._known:
                return self._known[start, field]
            try:
                raw = fields[field]
                pairs = ast.literal_eval(raw) if isinstance(raw, str) else raw
                table = sorted((int(tokens), float(share)) for tokens, share in pairs.items())
            except (KeyError, ValueError, SyntaxError, AttributeError, TypeError):
                raise TraceError(
                    f"{self._path}: {field} at {start:g} s is no {{tokens: share}}; mend the file"
                ) from None
            if table and sum(share for _, share in table) > 0.0:
                values, shares = (np.array(column) for column in zip(*table, strict=True))
                self._known[start, field] = values.astype(np.int64), np.cumsum(shares)
                return self._known[start, field]
        raise TraceError(f"{self._path}: no {field} by {at_s:g} s; give the client's dataset")


def _draw(
    number: int, window: _Window, lengths: _Lengths, factor: float, random: Random
) -> pl.DataFrame:
    """The requests of one client in one window; a faster client keeps the shape of its gaps."""
    span_s = window.end_s - window.start_s
    rate_rps = window.rate_rps * factor
    times: list[Floats] = []
    at_s = window.start_s
    while at_s < window.end_s:
        count = int(rate_rps * span_s) + 16
        gaps = _gaps(count, window, random)
        times.append(at_s + np.cumsum(gaps) / rate_rps)
        at_s = float(times[-1][-1])
    arrival_s = np.concatenate(times)
    arrival_s = arrival_s[arrival_s < window.end_s]
    draw = {
        field: lengths.draw(field, window.start_s, len(arrival_s), random)
        for field in ("input_tokens", "output_tokens")
    }
    table = pl.DataFrame({"arrival_s": arrival_s, **draw})
    return table.with_columns(client=pl.lit(f"client-{number}"))


def _gaps(count: int, window: _Window, random: Random) -> Floats:
    """Gaps of mean 1 by the window's own kind."""
    if window.is_weibull:
        mean = math.gamma(1.0 + 1.0 / window.shape)
        return (-np.log1p(-random.random(count))) ** (1.0 / window.shape) / mean
    return gamma_draws(count, window.shape, random) / window.shape


def _digest(files: list[tuple[int, Path]], note: str) -> str:
    state = hashlib.sha256(note.encode())
    for number, path in files:
        state.update(path.read_bytes())
        dataset = path.with_name(f"chunk-{number}-dataset.json")
        state.update(dataset.read_bytes() if dataset.is_file() else b"")
    return state.hexdigest()
