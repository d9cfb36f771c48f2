"""How does a trace become the load that is wanted? Pure steps, each noted in the new trace."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import polars as pl

from workloads.errors import TraceError
from workloads.model import Floats, Ints, Trace, blocks_of, first_use_codes, flat_codes, seeded

# A block followed by more different blocks than this share of all requests (and than four) is
# where a population's common system prompt ends, not a conversation that was branched.
POPULATION_SHARE = 0.02
POPULATION_MINIMUM = 4


def window(trace: Trace, start_s: float, end_s: float) -> Trace:
    """The requests with start_s <= arrival < end_s, their times counted from start_s.

    Prefixes first used before the window are cold in it. TraceError where it holds no request.
    """
    _check_finite("window", start_s, end_s)
    inside = (pl.col("arrival_s") >= start_s) & (pl.col("arrival_s") < end_s)
    frame = trace.frame.filter(inside).with_columns(pl.col("arrival_s") - start_s)
    if start_s < 0 or frame.is_empty():
        last_s = trace.frame["arrival_s"][-1]
        raise TraceError(
            f"window {start_s:g}-{end_s:g} s holds no request of {trace.name};"
            f" choose one within 0-{last_s:g} s"
        )
    return trace.changed(frame, f"window {start_s:g}-{end_s:g} s")


def speed(trace: Trace, factor: float) -> Trace:
    """The same requests, `factor` times as fast: every arrival time divided by it."""
    if not (math.isfinite(factor) and factor > 0):
        raise TraceError(f"speed {factor:g} cannot be; give a factor above 0, 2 for twice the load")
    frame = trace.frame.with_columns(pl.col("arrival_s") / factor)
    return trace.changed(frame, f"speed x{factor:g}")


def limit(trace: Trace, requests: int) -> Trace:
    """The first `requests` requests (all, where there are fewer)."""
    if requests < 1:
        raise TraceError(f"limit of {requests} requests leaves nothing; give 1 or more")
    return trace.changed(trace.frame.head(requests), f"first {requests} requests")


def jitter(trace: Trace, seed: int) -> Trace:
    """Spread the requests of each timestamp bucket uniformly over it; their order stays.

    The bucket's width is detected (3 s in Mooncake's traces); finely stamped traces barely move.
    """
    arrival_s = trace.frame["arrival_s"].to_numpy()
    width_s = bucket_width_s(arrival_s)
    stamps, bucket = np.unique(np.rint(arrival_s * 1e9), return_inverse=True)
    room = np.minimum(np.diff(stamps, append=math.inf), width_s * 1e9)
    shares = seeded(seed).random(len(arrival_s))
    # Sorted inside each bucket: the file's order is the order of arrival.
    shares = shares[np.lexsort((shares, bucket))]
    # Whole nanoseconds, rounded down: nothing reaches the next bucket, and writing loses nothing.
    moved = (stamps[bucket] + np.floor(shares * room[bucket])) / 1e9
    frame = trace.frame.with_columns(pl.Series("arrival_s", moved))
    return trace.changed(frame, f"jitter within {width_s:g} s buckets, seed {seed}", jittered=True)


def bucket_width_s(arrival_s: Floats) -> float:
    """The grid that sorted timestamps lie on, in seconds; 0 where all are equal.

    The usual distance between distinct timestamps, if nearly all distances are multiples of it
    (within 1 %: Mooncake's 3 s are off by a millisecond or two); else their greatest common
    divisor in nanoseconds.
    """
    gaps = np.diff(np.unique(np.rint(np.asarray(arrival_s) * 1e9).astype(np.int64)))
    if not len(gaps):
        return 0.0
    usual = float(np.median(gaps))
    off = np.abs(gaps / usual - np.maximum(np.rint(gaps / usual), 1))
    if len(gaps) > 1 and float(np.mean(off < 0.01)) > 0.95:
        # Rounded to 10 ms where that is what the stamps wobble around.
        rounded = round(usual / 1e7) * 1e7
        return (rounded if rounded and abs(rounded - usual) < 0.01 * usual else usual) / 1e9
    return float(np.gcd.reduce(gaps)) / 1e9


def cap_lengths(
    trace: Trace, input_tokens: int | None = None, output_tokens: int | None = None
) -> Trace:
    """Cut inputs and outputs to at most so many tokens; nothing is dropped.

    An input cut inside a block gets another id for that block, the same for all that were cut
    there: a shorter block is another block, as everywhere in a trace.
    """
    for name, cap in (("input", input_tokens), ("output", output_tokens)):
        if cap is not None and cap < 1:
            raise TraceError(f"{name} cap of {cap} tokens; give 1 or more")
    frame, notes = trace.frame, []
    if input_tokens is not None:
        frame = _cap_input(frame, input_tokens, trace.block_tokens)
        notes.append(f"input at most {input_tokens} tokens")
    if output_tokens is not None:
        frame = frame.with_columns(pl.col("output_tokens").clip(upper_bound=output_tokens))
        notes.append(f"output at most {output_tokens} tokens")
    return trace.changed(frame, ", ".join(notes)) if notes else trace


def _cap_input(frame: pl.DataFrame, cap: int, block_tokens: int) -> pl.DataFrame:
    """Inputs of at most `cap` tokens, ids to match."""
    keep = blocks_of(cap, block_tokens)
    is_long = pl.col("input_tokens") > cap
    ids = pl.col("hash_ids")
    if cap % block_tokens:
        cut = frame.filter(is_long)["hash_ids"].list.get(keep - 1).unique(maintain_order=True)
        fresh = _fresh_ids(frame["hash_ids"].explode(), cut, f"/{cap}")
        last = ids.list.get(keep - 1, null_on_oob=True).replace_strict(cut, fresh, default=None)
        shorter = pl.concat_list(ids.list.head(keep - 1), last)
    else:
        shorter = ids.list.head(keep)  # cut between blocks: what is kept is whole
    return frame.with_columns(
        pl.col("input_tokens").clip(upper_bound=cap),
        pl.when(is_long).then(shorter).otherwise(ids).alias("hash_ids"),
    )


def _fresh_ids(used: pl.Series, cut: pl.Series, suffix: str) -> pl.Series:
    """As many ids as `cut` has, none of them in use."""
    if used.dtype == pl.String:
        return cut + suffix
    taken = set(used)
    top = 2**63 - 1 if used.dtype == pl.Int64 else 2**64 - 1
    start = max(taken) + 1 if max(taken) + len(cut) <= top else 0
    free = (number for number in range(start, top) if number not in taken)
    return pl.Series([next(free) for _ in cut], dtype=used.dtype)


def scale_lengths(trace: Trace, divisor: int) -> Trace:
    """Inputs, outputs and blocks `divisor` times as short, rounded up: who shares what stays.

    TraceError where blocks cannot be divided so.
    """
    if divisor < 1 or trace.block_tokens % divisor:
        raise TraceError(
            f"blocks of {trace.block_tokens} tokens cannot be divided by {divisor};"
            " choose a divisor of them"
        )
    lengths = ("input_tokens", "output_tokens")
    shorter = [((pl.col(name) + divisor - 1) // divisor).alias(name) for name in lengths]
    changed = trace.changed(trace.frame.with_columns(shorter), f"lengths / {divisor}")
    return replace(changed, block_tokens=trace.block_tokens // divisor)


def sample(trace: Trace, share: float, seed: int) -> Trace:
    """About `share` of the requests: whole sessions, drawn by `seed`, at their own times."""
    if not 0 < share <= 1:
        raise TraceError(f"sample share {share:g} cannot be; give one above 0, at most 1")
    session = sessions(trace)
    sizes = np.bincount(session)
    order = np.argsort(seeded(seed).random(len(sizes)))
    reached = np.cumsum(sizes[order])
    # As many sessions as come nearest to the share; at least one.
    count = int(np.argmin(np.abs(reached - share * len(session)))) + 1
    chosen = np.zeros(len(sizes), dtype=bool)
    chosen[order[:count]] = True
    frame = trace.frame.filter(pl.Series(chosen[session]))
    return trace.changed(frame, f"sample {share:g} of sessions, seed {seed}")


def sessions(trace: Trace) -> Ints:
    """The session (0.. in order of first request) of each request.

    Requests of one session share a prefix that goes beyond the system prompt of their
    population. A system prompt ends at a block that is followed by very many different blocks
    (POPULATION_SHARE of all requests); it and what precedes it glue nothing together. So a
    session is named by its first block after that; a request with no such block is alone.
    Where the trace names its sessions, those are meant.
    """
    if "session" in trace.frame.columns:
        numbered = pl.concat_str(pl.lit("\0"), pl.col("request"))
        names = trace.frame.select(pl.coalesce("session", numbered)).to_series()
        return first_use_codes(names.to_numpy())
    codes, starts = flat_codes(trace)
    common = common_blocks(codes, starts)
    # Position of the first block of each row that is not common; the row's end if there is none.
    position = np.arange(len(codes))
    candidates = np.append(np.where(common[codes], len(codes), position), len(codes))
    first = np.minimum.reduceat(candidates, starts[:-1])
    has_own = first < starts[1:]
    alone = len(common) + np.arange(len(first))
    name = np.where(has_own, np.append(codes, 0)[np.minimum(first, len(codes))], alone)
    return first_use_codes(name)


def common_blocks(codes: Ints, starts: Ints) -> npt.NDArray[np.bool_]:
    """Which blocks belong to a population's common system prompt, by block code."""
    unique = int(codes.max()) + 1
    inside = np.ones(len(codes), dtype=bool)
    inside[starts[1:] - 1] = False  # a row's last block has no follower in it
    links = np.unique(codes[:-1][inside[:-1]] * unique + codes[1:][inside[:-1]])
    followers = np.bincount(links // unique, minlength=unique)
    common = followers > max(POPULATION_MINIMUM, POPULATION_SHARE * (len(starts) - 1))
    # What comes before such a block in any row is common as well.
    position = np.arange(len(codes))
    last = np.maximum.reduceat(np.where(common[codes], position, -1), starts[:-1])
    before = (position <= np.repeat(last, np.diff(starts))).astype(bool)
    common[codes[before]] = True
    return common


def _check_finite(what: str, *values: float) -> None:
    """Raise TraceError for a NaN or an infinite start."""
    if any(math.isnan(value) for value in values) or math.isinf(values[0]):
        raise TraceError(f"{what} {values[0]:g}-{values[-1]:g} s is not a span; give two times")
