"""More users, and users who share less: what becomes of a trace."""

from __future__ import annotations

import pytest

from workloads.errors import TraceError
from workloads.growth import unshared, users
from workloads.statistics import prefix_hit_ratio
from workloads.trace import open_trace

CHAT = "conversation-like:duration_s=600"


@pytest.mark.parametrize("factor", [1.0, 2.0, 2.5])
def test_more_users_bring_as_many_more_requests(factor: float):
    """In the same time, and each talks of other things: the reuse stays what it was."""
    trace = open_trace(CHAT)
    more = users(trace, factor, seed=1)
    assert more.frame.height == pytest.approx(factor * trace.frame.height, rel=0.02)
    assert more.frame["arrival_s"].is_sorted()
    assert more.frame["arrival_s"][-1] <= trace.frame["arrival_s"][-1] + 1e-6
    assert prefix_hit_ratio(more, None) == pytest.approx(prefix_hit_ratio(trace, None), abs=0.05)


def test_a_cache_must_grow_with_the_users():
    """Twice the users need about twice the cache: the same cache hits less."""
    trace = open_trace(CHAT)
    assert prefix_hit_ratio(users(trace, 3.0, 1), 10**6) < prefix_hit_ratio(trace, 10**6)


def test_unshared_prompts_hit_nothing():
    """All of them, half of them, none of them."""
    trace = open_trace(CHAT)
    whole = prefix_hit_ratio(trace, None)
    assert unshared(trace, 0.0, 1) is trace
    assert 0.3 * whole < prefix_hit_ratio(unshared(trace, 0.5, 1), None) < 0.8 * whole
    assert prefix_hit_ratio(unshared(trace, 1.0, 1), None) == 0.0


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_a_share(share: float):
    with pytest.raises(TraceError, match="from 0 to 1"):
        unshared(open_trace(CHAT), share, 1)


def test_no_users_make_no_trace():
    with pytest.raises(TraceError, match="above 0"):
        users(open_trace(CHAT), 0.0, 1)
