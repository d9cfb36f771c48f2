"""What if there were more users, or if they repeated themselves less? Pure steps on a trace."""

from __future__ import annotations

import math

import numpy as np
import polars as pl

from workloads.errors import TraceError
from workloads.model import Floats, Ints, Trace, flat_codes, nested, seeded
from workloads.transform import common_blocks, sample, sessions

# Copies of a trace start at most so much apart: bursts do not meet, the hour of the day stays.
SHIFT_S_MAX, SHIFT_SHARE = 300.0, 0.1


def users(trace: Trace, factor: float, seed: int) -> Trace:
    """`factor` times as many people like those of the trace, in the same time.

    Whole copies and a share of the sessions of a last one; each copy talks of other things (block
    ids of its own, but for system prompts common to all) and is shifted by up to five minutes or a
    tenth of the trace, wrapped around its end.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise TraceError(f"users x{factor:g} cannot be; give a factor above 0")
    if factor == 1.0:
        return trace
    whole, rest = int(factor), factor - int(factor)
    parts = [trace] * whole
    if rest > 1e-9:
        parts.append(sample(trace, rest, seed))
    span_s = float(trace.frame["arrival_s"][-1]) or 1.0
    shifts = seeded(seed).random(len(parts)) * min(SHIFT_S_MAX, SHIFT_SHARE * span_s)
    frames = [
        copied(part, place, float(shifts[place]) if place else 0.0, span_s)
        for place, part in enumerate(parts)
    ]
    frame = pl.concat(frames).sort("arrival_s", maintain_order=True)
    return trace.changed(frame, f"users x{factor:g}, seed {seed}")


def copied(part: Trace, place: int, shift_s: float, span_s: float) -> pl.DataFrame:
    """The copy at `place`, its ids apart from those of the others, its times shifted."""
    codes, starts = flat_codes(part)
    common = common_blocks(codes, starts)
    names = pl.Series(codes).cast(pl.String)
    if place:
        own = pl.Series(~common[codes])
        marked = pl.DataFrame({"name": names, "own": own}).select(
            pl.when("own").then(f"{place}/" + pl.col("name")).otherwise("name")
        )
        names = marked.to_series()
    frame = part.frame.with_columns(
        pl.Series("hash_ids", nested(names, np.diff(starts))),
        ((pl.col("arrival_s") + shift_s) % (span_s + 1e-9)).alias("arrival_s"),
    )
    if place and "session" in frame.columns:
        frame = frame.with_columns(f"{place}/" + pl.col("session"))
    return frame


def unshared(trace: Trace, share: float, seed: int) -> Trace:
    """The prompts of about `share` of the sessions share no block with any other prompt."""
    if not 0.0 <= share <= 1.0:
        raise TraceError(f"unshared {share:g} cannot be; give a share from 0 to 1")
    if share == 0.0:
        return trace
    session: Ints = sessions(trace)
    draw: Floats = seeded(seed).random(int(session.max()) + 1)
    alone = draw[session] < share
    codes, starts = flat_codes(trace)
    own = np.repeat(alone, np.diff(starts))
    fresh = np.where(own, codes.max() + 1 + np.arange(len(codes)), codes)
    frame = trace.frame.with_columns(
        pl.Series("hash_ids", nested(pl.Series(fresh), np.diff(starts)))
    )
    return trace.changed(frame, f"{share:g} of sessions unshared, seed {seed}")
