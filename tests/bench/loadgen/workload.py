"""What is every tool asked to send? The parts of the bench, and their traces."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

INPUT_TOKENS = 100
LARGE_TOKENS = 126_000
SLOWED = 4
"""Traces of over 1,000 requests a second are read as being in seconds: slowed, then sped up."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request: due time in seconds from the start, lengths in tokens."""

    due_s: float
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Part:
    """One experiment. Open loop where `rows` says when; else closed, `streams` for `seconds`."""

    name: str
    tokens: int
    ttft_ms: float = 50.0
    gap_ms: float = 10.0
    rows: tuple[Row, ...] = ()
    streams: int = 0
    seconds: float = 0.0

    @property
    def is_open(self) -> bool:
        return self.streams == 0


def poisson(rate_rps: float, seconds: float, tokens: int = 16) -> tuple[Row, ...]:
    """Exponential gaps, the same in every run."""
    draw, at, rows = random.Random(7), 0.0, []
    while (at := at + draw.expovariate(rate_rps)) < seconds:
        rows.append(Row(at, INPUT_TOKENS, tokens))
    return tuple(rows)


def bursts(count: int, size: int = 28, every_s: float = 0.3) -> tuple[Row, ...]:
    """So many bursts, each at one instant: what the conversation trace has."""
    return tuple(
        Row(every_s * burst, INPUT_TOKENS, 16) for burst in range(count) for _ in range(size)
    )


def with_large(rows: tuple[Row, ...], every_s: float, seconds: float) -> tuple[Row, ...]:
    """The rows, and a prompt of 126,000 tokens every so often beside them."""
    large = [Row(every_s * (n + 0.5), LARGE_TOKENS, 16) for n in range(int(seconds / every_s))]
    return tuple(sorted([*rows, *large], key=lambda row: row.due_s))


def parts(seconds: float) -> dict[str, Part]:
    """All parts by name; `seconds` is how long each lasts."""
    every = [
        Part("closed16", 16, 0.0, 0.0, streams=64, seconds=seconds),
        Part("closed256", 256, 0.0, 0.0, streams=32, seconds=seconds),
        *(Part(f"open{rate}", 16, rows=poisson(rate, seconds)) for rate in (50, 200, 500, 1000)),
        Part("bursts", 16, rows=bursts(int(seconds / 0.3))),
        Part("large", 16, rows=with_large(poisson(50, seconds), 1.0, seconds)),
    ]
    return {part.name: part for part in every}


def mooncake_trace(part: Part, path: Path, closed_rows: int) -> Path:
    """JSON lines as in Mooncake's traces, SLOWED times slower; in closed loop so many rows at 0."""
    rows = part.rows or [Row(0.0, 16, part.tokens)] * closed_rows
    blocks = 0
    with path.open("w") as file:
        for row in rows:
            needed = -(-row.input_tokens // 512)
            ids = list(range(blocks, blocks + needed))
            blocks += needed
            value = {
                "timestamp": row.due_s * SLOWED * 1e3,
                "input_length": row.input_tokens,
                "output_length": row.output_tokens,
                "hash_ids": ids,
            }
            file.write(json.dumps(value) + "\n")
    return path
