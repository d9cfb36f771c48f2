"""When do requests arrive, if not as the trace says?"""

from __future__ import annotations

import numpy as np
import pytest

from workloads.arrivals import arrivals
from workloads.trace import Trace, TraceError, open_trace


@pytest.fixture(scope="module")
def trace() -> Trace:
    return open_trace("conversation-like:duration_s=2000")


def gaps(trace: Trace) -> np.ndarray:
    return np.diff(trace.frame["arrival_s"].to_numpy())


def test_constant_gaps_are_really_constant(trace: Trace):
    """Five a second: 0.2 s each, to the nanosecond."""
    even = arrivals(trace, "constant:rate_rps=5", 0)
    assert gaps(even) == pytest.approx(0.2, abs=2e-9)
    assert even.frame["arrival_s"][0] == 0.0
    assert even.transforms[-1] == "constant arrivals, rate_rps 5"
    assert even.frame.drop("arrival_s").equals(trace.frame.drop("arrival_s"))


@pytest.mark.parametrize(
    ("spec", "spread"),
    [
        ("poisson:rate_rps=5", 1.0),  # exponential gaps
        ("gamma:rate_rps=5,burstiness=0.25", 2.0),  # CV is burstiness ** -0.5
        ("gamma:rate_rps=5,burstiness=4", 0.5),
        ("gamma:rate_rps=5", 1.0),
    ],
)
def test_drawn_gaps_have_the_rate_and_the_spread_asked_for(trace: Trace, spec: str, spread: float):
    """6,800 gaps of mean 0.2 s; the same seed draws the same, another one others."""
    drawn = arrivals(trace, spec, 1)
    assert gaps(drawn).mean() == pytest.approx(0.2, rel=0.06)
    assert gaps(drawn).std() / gaps(drawn).mean() == pytest.approx(spread, rel=0.06)
    assert drawn.frame.equals(arrivals(trace, spec, 1).frame)
    assert not drawn.frame.equals(arrivals(trace, spec, 2).frame)


def test_without_a_rate_the_traces_own_is_kept(trace: Trace):
    """Only the process changes."""
    assert arrivals(trace, "constant", 0).rate_rps == pytest.approx(trace.rate_rps, rel=1e-3)


def test_a_ramp_goes_evenly_from_one_rate_to_the_other(trace: Trace):
    """From 1 to 9 a second: 5 on average, 1 at first, 9 at last; it may fall, or be level."""
    up = arrivals(trace, "ramp:from_rps=1,to_rps=9", 0)
    assert up.rate_rps == pytest.approx(5.0, rel=1e-3)
    assert 1 / gaps(up)[-20:].mean() == pytest.approx(9.0, rel=0.01)
    down = arrivals(trace, "ramp:from_rps=9,to_rps=1", 0)
    assert gaps(down)[::-1] == pytest.approx(gaps(up), rel=1e-3, abs=1e-6)
    assert gaps(arrivals(trace, "ramp:from_rps=4,to_rps=4", 0)) == pytest.approx(0.25, abs=2e-9)


def test_trace_changes_nothing(trace: Trace):
    """The default."""
    assert arrivals(trace, "trace", 0) is trace


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("poison", "use trace, constant, poisson, gamma, ramp"),
        ("poisson:rate=5", "use rate_rps"),
        ("poisson:rate_rps=fast", "write rate_rps=5"),
        ("gamma:burstiness=0", "burstiness must be above 0"),
        ("ramp:from_rps=1", "to_rps is 0; give it a number above 0"),
    ],
)
def test_what_cannot_be_is_one_line(trace: Trace, spec: str, words: str):
    """The spec and the remedy."""
    with pytest.raises(TraceError, match=f"^arrivals '{spec}': .*{words}"):
        arrivals(trace, spec, 0)
