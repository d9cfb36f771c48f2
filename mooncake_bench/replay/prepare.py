"""Which rows does a replay send? The trace of the options, read, cut and checked."""

from __future__ import annotations

from mooncake_bench.replay.errors import ReplayError
from mooncake_bench.replay.options import ReplayOptions, parse_window
from workloads.arrivals import arrivals
from workloads.trace import Trace, open_trace
from workloads.transform import jitter, limit, sample, window


def load_trace(options: ReplayOptions) -> Trace:
    """The trace with window, sample, limit, jitter and arrivals applied, in that order.

    The speed is not: it changes release times only (schedule.py). Raises TraceError.
    """
    trace = open_trace(options.trace, seed=options.seed, block_tokens=options.block_tokens)
    if bounds := parse_window(options.window):
        trace = window(trace, *bounds)
    if options.sample < 1.0:
        trace = sample(trace, options.sample, options.seed)
    if options.limit:
        trace = limit(trace, options.limit)
    if options.jitter:
        trace = jitter(trace, options.seed)
    trace = arrivals(trace, options.arrivals, options.seed)
    if not trace.frame.height:
        raise ReplayError(f"{options.trace}: no request is left to send; widen the window")
    return trace
