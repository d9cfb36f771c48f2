"""Rows go out at their times, after their session's last turn, or as places become free."""

import numpy as np
import polars as pl
import pytest

from mooncake_bench.replay.release import NEVER, Releases, Retry
from mooncake_bench.replay.schedule import Plan

START = 100.0


def a_plan(due_s: list[float], after: list[int] | None = None, pause_s: float = 1.0) -> Plan:
    count = len(due_s)
    return Plan(
        request=np.arange(count),
        due_s=np.array(due_s),
        input_tokens=np.full(count, 2),
        output_tokens=np.full(count, 3),
        hash_ids=pl.Series([[row] for row in range(count)]),
        after=np.array(after) if after else None,
        pause_s=np.full(count, pause_s) if after else None,
    )


def test_in_open_loop_the_plan_says_when():
    """Nothing that becomes of a request moves the others."""
    releases = Releases(a_plan([0.0, 2.0, 2.0, 5.0]), START)
    seen = []
    while not releases.is_over:
        seen.append((releases.next_at, *releases.pop()))
        assert not releases.settled(seen[-1][1], START + 50.0)
    assert seen == [(100.0, 0, None), (102.0, 1, None), (102.0, 2, None), (105.0, 3, None)]
    assert releases.next_at == NEVER


def test_in_closed_loop_a_row_waits_for_a_place():
    """Two places: the third row is released when one of the first two has ended."""
    releases = Releases(a_plan([0.0, 7.0, 8.0, 9.0]), START, concurrency=2)
    assert [releases.pop(), releases.pop()] == [(0, START), (1, START)]
    assert releases.next_at == NEVER
    assert releases.settled(1, 103.0)
    assert releases.next_at == 103.0
    assert releases.pop() == (2, 103.0)
    assert not releases.is_over


def test_a_turn_is_released_after_the_answer_to_the_turn_before():
    """Ended at 104, a pause of 1: at 105. Another turn that ended at 101 waits for its own time."""
    releases = Releases(a_plan([0.0, 0.0, 3.0, 9.0], after=[-1, -1, 0, 1]), START)
    assert [releases.pop()[0], releases.pop()[0]] == [0, 1]
    assert releases.next_at == NEVER
    assert releases.settled(0, 104.0)
    assert releases.settled(1, 101.0)
    assert releases.pop() == (2, 105.0)
    assert releases.pop() == (3, 109.0)
    assert releases.is_over


def test_how_many_are_due_soon_is_known_for_opening_connections():
    """Planned rows, answered ones, and free places in closed loop."""
    releases = Releases(a_plan([0.0, 0.1, 5.0], after=[-1, -1, 0]), START)
    assert releases.due_before(START + 1.0) == 2
    releases.pop()
    releases.settled(0, START + 4.5)
    assert releases.due_before(START + 6.0) == 2
    assert Releases(a_plan([0.0, 9.0, 9.0]), START, 2).due_before(START) == 2


@pytest.mark.parametrize(("retry_after_s", "pause_s"), [(0.0, 0.0), (2.5, 2.5), (900.0, 30.0)])
def test_a_retry_comes_when_the_server_asks_for_it(retry_after_s, pause_s):
    """But not later than the cap."""
    assert Retry().pause_s(7, 1, retry_after_s) == pause_s


def test_without_a_word_from_the_server_pauses_grow_and_differ():
    """Full jitter: a share of 0.5, 1, 2, ... s, the same in every run of the same request."""
    retry, nan = Retry(base_s=0.5, cap_s=4.0), float("nan")
    for attempt, most_s in ((1, 0.5), (2, 1.0), (3, 2.0), (9, 4.0)):
        pauses = [retry.pause_s(request, attempt, nan) for request in range(200)]
        assert 0.8 * most_s < max(pauses) <= most_s
        assert len(set(pauses)) == 200
        assert pauses[5] == retry.pause_s(5, attempt, nan)
