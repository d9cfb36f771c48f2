"""How does my traffic behave? A trace becomes a few tables that can be shared instead of it.

Fitted: the rate over time (diurnal), how much counts scatter around it (bursts), populations by
their common system prompt, and for each the lengths of first and later requests, the pauses and
growth of sessions, and how much is continued. No row, no block id and no order of the trace is
kept; the tables hold quantiles, their ends the smallest and largest value that were seen.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from workloads.arrivals import gamma_draws
from workloads.conversation import LEVELS, Conversations, Shape, Turn, even_levels
from workloads.errors import TraceError
from workloads.model import Floats, Ints, Random, Trace, flat_codes, seeded
from workloads.statistics import prefix_hit_ratio
from workloads.synthesize import frame_of
from workloads.transform import common_blocks, jitter

VERSION = 1
BIN_S = 300.0  # The rate is taken over parts of about so many seconds.
BINS = (4, 96)
COUNT_S = 10.0  # Scatter of counts is taken over windows of so many seconds, at least.
POPULATION_SHARE = 0.02  # Smaller populations are put together.
BURSTINESS = (0.02, 20.0)
TABLES = ("first_input", "later_input", "output", "gap_s", "growth", "kept")


class Fitted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A generator fitted to a trace. `rates` are relative to the mean, in equal parts of the time.

    `burstiness` is the shape of the gamma distribution of gaps, as vLLM's flag: 1 is Poisson.
    """

    version: int
    block_tokens: int
    duration_s: float
    rate_rps: float
    rates: tuple[float, ...]
    burstiness: float
    populations: tuple[Shape, ...]


def fit(trace: Trace, seed: int = 0) -> Fitted:
    """Fit a generator to a trace of at least 50 requests; raises TraceError."""
    if trace.frame.height < 50 or trace.duration_s <= 0:
        raise TraceError(
            f"{trace.name}: {trace.frame.height} requests; give at least 50, over time"
        )
    fine = trace if trace.jittered else jitter(trace, seed)
    rates, burstiness = arrivals(fine.frame["arrival_s"].to_numpy())
    first = Fitted(
        VERSION,
        trace.block_tokens,
        float(fine.frame["arrival_s"][-1]),
        trace.frame.height / float(fine.frame["arrival_s"][-1]),
        rates,
        burstiness,
        populations(fine),
    )
    return calibrated(first, prefix_hit_ratio(trace, None), seed)


def calibrated(fitted: Fitted, hit_ratio: float, seed: int) -> Fitted:
    """With shares of continuations at which the generated reuse is that of the trace.

    What continues a session from before the trace's start counts as a first request there, so the
    share that is measured is too small, by an amount that only generating tells.
    """

    def scaled(factor: float) -> Fitted:
        shapes = tuple(
            msgspec.structs.replace(one, reuse=round(min(one.reuse * factor, 0.999), 5))
            for one in fitted.populations
        )
        return msgspec.structs.replace(fitted, populations=shapes)

    low, high = 0.5, 4.0
    for _ in range(8):
        middle = (low + high) / 2
        if prefix_hit_ratio(generated(scaled(middle), seed), None) < hit_ratio:
            low = middle
        else:
            high = middle
    return scaled((low + high) / 2)


# ---- when ------------------------------------------------------------------------------------


def arrivals(arrival_s: Floats) -> tuple[tuple[float, ...], float]:
    """Relative rates in equal parts, and the burstiness around them."""
    end_s = float(arrival_s[-1])
    bins = int(np.clip(round(end_s / BIN_S), *BINS))
    counts = np.histogram(arrival_s, bins=bins, range=(0.0, end_s))[0]
    rates = counts / counts.mean()
    # Counts over short windows, against what the rate of their part lets expect.
    per_bin = max(1, int(end_s / bins / COUNT_S))
    short = np.histogram(arrival_s, bins=bins * per_bin, range=(0.0, end_s))[0]
    expected = np.repeat(counts / per_bin, per_bin)
    # One degree of freedom of each part is in its own mean.
    squares = ((short - expected) ** 2).reshape(bins, per_bin).sum(axis=1) / max(per_bin - 1, 1)
    dispersion = float(squares.sum() / max(counts.sum() / per_bin, 1e-9))
    # For gaps of a gamma distribution the variance of counts over their mean tends to 1 / shape.
    shape = float(np.clip(1.0 / max(dispersion, 1e-9), *BURSTINESS)) if per_bin > 1 else 1.0
    return tuple(round(float(rate), 4) for rate in rates), round(shape, 4)


def drawn_arrivals(fitted: Fitted, random: Random) -> Floats:
    """Sorted arrival times in seconds; as many as rate and duration say."""
    count = round(fitted.rate_rps * fitted.duration_s)
    if not 1 <= count <= 10_000_000:
        raise TraceError(f"a fitted trace of {count} requests cannot be; ask for 1 to 10M")
    passed = np.cumsum(gamma_draws(count + 1, fitted.burstiness, random))
    passed = passed[:-1] / passed[-1]
    rates = np.maximum(np.array(fitted.rates), 1e-6)
    until = np.concatenate(([0.0], np.cumsum(rates))) / rates.sum()
    edges = np.linspace(0.0, fitted.duration_s, len(rates) + 1)
    return np.asarray(np.rint(np.interp(passed, until, edges) * 1e9) / 1e9)


# ---- what ------------------------------------------------------------------------------------


class Links:
    """Which earlier request each request continues, and how much of it."""

    def __init__(self, trace: Trace) -> None:
        codes, starts = flat_codes(trace)
        common = common_blocks(codes, starts)
        count = len(starts) - 1
        self.system = np.zeros(count, dtype=np.int64)  # Leading blocks common to a population.
        self.population = np.full(count, -1, dtype=np.int64)
        self.shared = np.zeros(count, dtype=np.int64)
        self.parent = np.full(count, -1, dtype=np.int64)
        last_user: dict[int, int] = {}
        is_common = common.tolist()
        for row in range(count):
            blocks = codes[starts[row] : starts[row + 1]].tolist()
            depth = next((i for i, one in enumerate(blocks) if not is_common[one]), len(blocks))
            self.system[row] = depth
            if depth:
                self.population[row] = blocks[depth - 1]
            shared = next((i for i, one in enumerate(blocks) if one not in last_user), len(blocks))
            self.shared[row] = shared
            if shared > depth:
                self.parent[row] = last_user[blocks[shared - 1]]
            for one in blocks:
                last_user[one] = row


def populations(trace: Trace) -> tuple[Shape, ...]:
    """The largest first; whatever belongs to none, or to a small one, is together."""
    links = Links(trace)
    names = links.population.copy()
    count = len(names)
    sizes = Counter(names.tolist())
    for name, size in sizes.items():
        if size < POPULATION_SHARE * count:
            names[names == name] = -1
    kept = sorted(Counter(names.tolist()).items(), key=lambda one: (-one[1], one[0]))
    return tuple(shape_of(trace, links, names == name, size / count) for name, size in kept)


def shape_of(trace: Trace, links: Links, member: Any, share: float) -> Shape:
    """The tables of one population."""
    frame, size = trace.frame, trace.block_tokens
    input_tokens = frame["input_tokens"].to_numpy()
    arrival_s = frame["arrival_s"].to_numpy()
    later = member & (links.parent >= 0)
    rows, parents = np.flatnonzero(later), links.parent[later]
    whole = np.maximum(input_tokens[parents] // size, 1)
    is_edited = links.shared[rows] < whole
    growth = np.maximum(input_tokens[rows] - input_tokens[parents], 0)[~is_edited]
    kept = (links.shared[rows] / whole)[is_edited]
    continued = np.bincount(parents, minlength=len(input_tokens)) > 0
    default = Shape()
    values: dict[str, Any] = {
        "first_input": input_tokens[member & ~later],
        "later_input": input_tokens[rows],
        "output": frame["output_tokens"].to_numpy()[member],
        "gap_s": arrival_s[rows] - arrival_s[parents],
        "growth": growth,
        "kept": kept,
    }
    tables = {name: table(values[name], getattr(default, name)) for name in TABLES}
    shortest = input_tokens[continued & member]
    return Shape(
        share=round(share, 5),
        system_tokens=int(np.median(links.system[member])) * size,
        reuse=round(float(later.sum() / member.sum()), 5),
        edited=round(float(is_edited.mean()) if len(rows) else 0.0, 5),
        later=round(float((links.parent[parents] >= 0).mean()) if len(rows) else 0.0, 5),
        continuable_tokens=int(np.quantile(shortest, 0.02)) if len(shortest) else 1,
        later_growth_tokens=float(np.quantile(growth, 0.95)) if len(growth) else 1.0,
        **tables,
    )


def table(values: Any, default: tuple[float, ...]) -> tuple[float, ...]:
    """Quantiles at LEVELS to four digits; nobody's where there are no values."""
    if not len(values):
        return default
    return tuple(float(f"{value:.4g}") for value in np.quantile(values, LEVELS))


# ---- making a trace of it --------------------------------------------------------------------


def generated(
    fitted: Fitted, seed: int = 0, *, name: str = "fitted", block_tokens: int | None = None
) -> Trace:
    """A trace that behaves like the one that was fitted; the same for the same seed."""
    random = seeded(seed)
    size = block_tokens or fitted.block_tokens
    arrival_s = drawn_arrivals(fitted, random)
    shares = np.cumsum([one.share for one in fitted.populations])
    level = even_levels(random, len(arrival_s)) * shares[-1]
    chosen: Ints = np.minimum(np.searchsorted(shares, level, side="right"), len(shares) - 1)
    turns: list[Turn | None] = [None] * len(arrival_s)
    next_id = 0
    for place, shape in enumerate(fitted.populations):
        rows = np.flatnonzero(chosen == place)
        people = Conversations(random, size, shape.reuse, shape=shape, next_id=next_id)
        for row, turn in zip(rows.tolist(), people.run(arrival_s[rows]), strict=True):
            turns[row] = turn
        next_id = people.next_id
    frame = frame_of(arrival_s, [turn for turn in turns if turn is not None])
    text = msgspec.json.encode([VERSION, fitted, size, seed], order="deterministic")
    note = f"generated with {fitted.rate_rps:g} req/s for {fitted.duration_s:g} s, seed {seed}"
    return Trace(frame, name, hashlib.sha256(text).hexdigest(), size, False, (note,))


def open_fitted(path: str | Path, *, seed: int = 0, **parameters: float) -> Trace:
    """A trace of a file of `trace fit`; `rate_rps` and `duration_s` replace its own.

    Raises TraceError, one line.
    """
    try:
        fitted = msgspec.toml.decode(Path(path).read_bytes(), type=Fitted)
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}; give a file of trace fit") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {error}; write it anew with trace fit") from None
    for key, value in parameters.items():
        if key not in ("rate_rps", "duration_s"):
            raise TraceError(f"{path}: no parameter {key!r}; use rate_rps, duration_s")
        if not value > 0:
            raise TraceError(f"{path}: {key} is {value:g}; give a number above 0")
    check(path, fitted)
    fitted = msgspec.structs.replace(fitted, **parameters)
    return generated(fitted, seed, name=Path(path).stem)


def check(path: str | Path, fitted: Fitted) -> None:
    """Raise TraceError for what cannot be generated."""
    levels = len(LEVELS)
    wrong = [
        (fitted.version != VERSION, f"version {fitted.version}, not {VERSION}"),
        (not fitted.populations or not fitted.rates, "no populations or no rates"),
        (fitted.block_tokens < 1, "block_tokens below 1"),
        (min(fitted.duration_s, fitted.rate_rps, fitted.burstiness) <= 0, "a value not above 0"),
        (sum(one.share for one in fitted.populations) <= 0, "no population has a share"),
        (
            any(len(getattr(one, name)) != levels for one in fitted.populations for name in TABLES),
            f"a table without {levels} quantiles",
        ),
    ]
    for is_wrong, what in wrong:
        if is_wrong:
            raise TraceError(f"{path}: {what}; write it anew with trace fit")


def write_fitted(fitted: Fitted, path: Path, note: str) -> None:
    """As TOML; raises TraceError. `note` says where it is from."""
    lines = [f"# {note}"]
    values = msgspec.json.decode(msgspec.json.encode(fitted))
    shapes = values.pop("populations")
    lines += [f"{name} = {value}" for name, value in values.items()]
    for shape in shapes:
        lines += ["", "[[populations]]"]
        lines += [f"{name} = {value}" for name, value in shape.items()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}; choose another --out") from None
