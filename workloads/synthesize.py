"""What if there is no trace at hand? Seeded generators of load like the published traces."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable
from functools import partial
from itertools import chain
from statistics import NormalDist

import numpy as np
import polars as pl

from workloads.conversation import Conversations, Turn, even_levels
from workloads.errors import TraceError
from workloads.model import (
    Floats,
    Random,
    Trace,
    build_frame,
    check_block_tokens,
    first_use_codes,
    seeded,
)

# Part of a generated trace's identity: raise it with any change of what a seed yields.
VERSION = 1

CONVERSATION_REUSE = 0.45
CHAT_REUSE = 0.56
# Shares of the tool&agent trace by first block: chat, tool A, tool B.
POPULATIONS = (0.465, 0.39, 0.145)


def generate(name: str, *, seed: int = 0, block_tokens: int = 512, **parameters: float) -> Trace:
    """The trace of a generator, the same for the same name, parameters and seed.

    Raises TraceError for a name or a parameter that does not exist, or a value out of range.
    """
    if name not in GENERATORS:
        raise TraceError(f"no generator {name!r}; there are {', '.join(GENERATORS)}")
    generator = GENERATORS[name]
    known = parameters_of(name)
    for key, value in parameters.items():
        if key not in known:
            raise TraceError(f"{name} has no parameter {key!r}; it has {', '.join(known)}")
        if not math.isfinite(value) or value < 0 or (value == 0 and key != "quantise_s"):
            raise TraceError(f"{name}: {key} is {value:g}; give a number above 0")
    check_block_tokens(block_tokens)
    resolved = known | {key: float(value) for key, value in parameters.items()}
    frame = generator(seeded(seed), block_tokens, **resolved)
    identity = f"workloads {VERSION} {name} {sorted(resolved.items())} {block_tokens} {seed}"
    digest = hashlib.sha256(identity.encode()).hexdigest()
    said = ", ".join(f"{key} {value:g}" for key, value in resolved.items())
    return Trace(frame, name, digest, block_tokens, False, (f"generated with {said}, seed {seed}",))


def parameters_of(name: str) -> dict[str, float]:
    """A generator's parameters with their default values."""
    return {
        key: float(parameter.default)
        for key, parameter in inspect.signature(GENERATORS[name]).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


# --- like the published traces ------------------------------------------------------------------


def conversation_like(
    random: Random,
    block_tokens: int,
    *,
    duration_s: float = 3600.0,
    rate_rps: float = 3.4,
    quantise_s: float = 0.0,
) -> pl.DataFrame:
    """Requests like Mooncake's conversation trace, from cold caches on.

    `quantise_s` 3 stamps them as the real trace does, in buckets of 3 s.
    """
    arrival_s = _arrivals(random, duration_s, rate_rps, quantise_s)
    turns = Conversations(random, block_tokens, CONVERSATION_REUSE).run(arrival_s)
    return frame_of(arrival_s, turns)


def toolagent_like(
    random: Random,
    block_tokens: int,
    *,
    duration_s: float = 3600.0,
    rate_rps: float = 23608 / 3600,
    quantise_s: float = 0.0,
) -> pl.DataFrame:
    """Requests like Mooncake's tool&agent trace: chat, and two tools with long system prompts."""
    arrival_s = _arrivals(random, duration_s, rate_rps, quantise_s)
    chat, tool_a = POPULATIONS[0], POPULATIONS[0] + POPULATIONS[1]
    population = np.digitize(even_levels(random, len(arrival_s)), (chat, tool_a))
    people = Conversations(random, block_tokens, CHAT_REUSE, length_scale=0.95, output_scale=1.08)
    turns: list[Turn | None] = [None] * len(arrival_s)
    rows = [np.flatnonzero(population == kind) for kind in range(3)]
    made = (
        people.run(arrival_s[rows[0]]),
        _tool_a(random, len(rows[1]), people),
        _tool_b(random, len(rows[2]), people),
    )
    for kind_rows, kind_turns in zip(rows, made, strict=True):
        for row, turn in zip(kind_rows, kind_turns, strict=True):
            turns[row] = turn
    return frame_of(arrival_s, [turn for turn in turns if turn is not None])


def _tool_a(random: Random, n: int, ids: Conversations) -> list[Turn]:
    """12 shared blocks of 512, 6.2-8.2k tokens in; out 3 in 60 %, else 25-50."""
    length = 6200 + 2000 * even_levels(random, n)
    level = even_levels(random, n)
    output = np.where(level < 0.6, 3, 25 + 26 * (level - 0.6) / 0.4)
    return _with_prefix(ids, 12 * 512, length, output)


def _tool_b(random: Random, n: int, ids: Conversations) -> list[Turn]:
    """5 shared blocks of 512, about 3.1k tokens in; out 16-24."""
    length = 2900 + 400 * even_levels(random, n)
    return _with_prefix(ids, 5 * 512, length, 16 + 9 * even_levels(random, n))


def _with_prefix(
    ids: Conversations, prefix_tokens: int, length: Floats, output: Floats
) -> list[Turn]:
    """Requests that share their first `prefix_tokens` and nothing else."""
    shared = ids.fresh(prefix_tokens // ids.block_tokens)
    return [
        ids.turn(shared, int(tokens), int(out)) for tokens, out in zip(length, output, strict=True)
    ]


# --- the papers' synthetic points (arXiv 2407.00079, Table 2) ----------------------------------


def poisson(
    random: Random,
    block_tokens: int,
    *,
    input_tokens: float = 16 * 1024,
    output_tokens: float = 512,
    shared: float = 0.5,
    duration_s: float = 3600.0,
    rate_rps: float = 1.0,
) -> pl.DataFrame:
    """Poisson arrivals of one fixed prompt length, of which the share `shared` is common to all.

    The common part is whole blocks; all that the papers say is "50 %".
    """
    if shared > 1 or min(input_tokens, output_tokens) < 1:
        raise TraceError("poisson: give shared of at most 1, and lengths of 1 token or more")
    arrival_s = _arrivals(random, duration_s, rate_rps)
    length = np.full(len(arrival_s), input_tokens)
    output = np.full(len(arrival_s), output_tokens)
    ids = Conversations(random, block_tokens, 0.0)
    return frame_of(arrival_s, _with_prefix(ids, int(shared * input_tokens), length, output))


def arxiv_summarization_like(
    random: Random, block_tokens: int, *, duration_s: float = 3600.0, rate_rps: float = 1.0
) -> pl.DataFrame:
    """Summaries of papers: 8,088 tokens in, 229 out on average, nothing shared, Poisson."""
    arrival_s = _arrivals(random, duration_s, rate_rps)
    n = len(arrival_s)
    length = _log_normal(random, n, mean=8088, sigma=0.6, low=500, high=32_000)
    output = _log_normal(random, n, mean=229, sigma=0.45, low=30, high=1000)
    return frame_of(
        arrival_s, _with_prefix(Conversations(random, block_tokens, 0.0), 0, length, output)
    )


def leval_like(
    random: Random,
    block_tokens: int,
    *,
    duration_s: float = 3600.0,
    rate_rps: float = 1.0,
    questions: float = 12,
) -> pl.DataFrame:
    """Questions about long documents: 19,019 tokens in, 72 out on average, over 80 % reused.

    Each document is asked `questions` times in a row of requests, at Poisson times.
    """
    arrival_s = _arrivals(random, duration_s, rate_rps)
    n, per_document = len(arrival_s), max(1, int(questions))
    documents = -(-n // per_document)
    length = _log_normal(random, documents, mean=18_900, sigma=0.45, low=3000, high=60_000)
    asked = 40 + 160 * even_levels(random, n)
    output = _log_normal(random, n, mean=72, sigma=0.8, low=1, high=512)
    ids = Conversations(random, block_tokens, 0.0)
    shared = [ids.fresh(int(tokens) // block_tokens) for tokens in length]
    # Four documents are open at a time, so that their questions interleave.
    document = [_open_document(i, per_document, documents) for i in range(n)]
    return frame_of(
        arrival_s,
        [
            ids.turn(shared[d], int(length[d] + asked[i]), int(output[i]))
            for i, d in enumerate(document)
        ],
    )


def _open_document(request: int, per_document: int, documents: int, side_by_side: int = 4) -> int:
    """Which document a request asks about: `side_by_side` of them take turns until used up."""
    group, place = divmod(request, per_document * side_by_side)
    width = min(side_by_side, documents - group * side_by_side)
    return group * side_by_side + place % width


# --- shared --------------------------------------------------------------------------------------


def _arrivals(
    random: Random, duration_s: float, rate_rps: float, quantise_s: float = 0.0
) -> Floats:
    """Arrival times in seconds, sorted: a Poisson process given its number of requests.

    The number is round(rate * duration), so that short windows have the rate asked for.
    """
    n = round(rate_rps * duration_s)
    if not 1 <= n <= 10_000_000:
        raise TraceError(
            f"{rate_rps:g} requests/s for {duration_s:g} s make {n} requests; ask for 1 to 10M"
        )
    arrival_s = np.sort(random.random(n)) * duration_s
    if quantise_s > 0:
        arrival_s = np.floor(arrival_s / quantise_s) * quantise_s
    return np.asarray(np.rint(arrival_s * 1e9) / 1e9, dtype=np.float64)


def _log_normal(
    random: Random, n: int, *, mean: float, sigma: float, low: float, high: float
) -> Floats:
    """Log-normal values of a given mean, cut to [low, high]."""
    even = NormalDist()
    level = np.clip(even_levels(random, n), 1e-6, 1 - 1e-6)
    normal = np.array([even.inv_cdf(x) for x in level.tolist()])
    return np.clip(mean * np.exp(sigma * normal - sigma**2 / 2), low, high)


def frame_of(arrival_s: Floats, turns: list[Turn]) -> pl.DataFrame:
    """The frame of generated requests, ids numbered by first use as in Mooncake's files."""
    ids = np.fromiter(chain.from_iterable(turn.ids for turn in turns), dtype=np.int64)
    return build_frame(
        arrival_s,
        [turn.input_tokens for turn in turns],
        [turn.output_tokens for turn in turns],
        pl.Series(first_use_codes(ids)),
        np.array([len(turn.ids) for turn in turns], dtype=np.int64),
    )


def _poisson_point(thousands: int, rate_rps: float) -> Callable[..., pl.DataFrame]:
    """The papers' synthetic point at so many k tokens a prompt."""
    return partial(poisson, input_tokens=thousands * 1024, rate_rps=rate_rps)


# name: function(random, block_tokens, **parameters) -> frame
GENERATORS: dict[str, Callable[..., pl.DataFrame]] = {
    "conversation-like": conversation_like,
    "toolagent-like": toolagent_like,
    "poisson-16k": _poisson_point(16, 1.0),
    "poisson-32k": _poisson_point(32, 0.5),
    "poisson-64k": _poisson_point(64, 0.25),
    "poisson-128k": _poisson_point(128, 0.125),
    "arxiv-summarization-like": arxiv_summarization_like,
    "leval-like": leval_like,
}
