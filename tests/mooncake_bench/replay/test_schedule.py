"""When is request i sent, and by which worker?"""

import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from mooncake_bench.replay.schedule import plan, release_times, share, share_of_sessions

FRAME = pl.DataFrame(
    {
        "request": [0, 1, 2, 3, 4],
        "arrival_s": [0.0, 3.0, 3.0, 6.0, 12.0],
        "input_tokens": [1, 512, 513, 7, 8],
        "output_tokens": [1, 2, 3, 4, 5],
        "hash_ids": [[1], [2], [2, 3], [4], [5]],
    },
    schema_overrides={"hash_ids": pl.List(pl.UInt64)},
)


def test_a_speed_of_two_halves_every_release_time():
    """12 s at twice the speed is 6 s; nothing else of the trace changes."""
    twice = plan(FRAME, speed=2.0)
    assert twice.due_s.tolist() == [0.0, 1.5, 1.5, 3.0, 6.0]
    assert twice.output_tokens.tolist() == [1, 2, 3, 4, 5]
    assert twice.blocks(2) == [2, 3]


def test_row_i_goes_to_worker_i_modulo_workers():
    """Rows 1 and 3 are those of the second of two workers, under the numbers of the trace."""
    second = plan(FRAME, speed=1.0, worker=1, workers=2)
    assert second.request.tolist() == [1, 3]
    assert second.due_s.tolist() == [3.0, 6.0]


@given(st.integers(0, 300), st.integers(1, 9))
def test_every_row_belongs_to_exactly_one_worker(rows: int, workers: int):
    """The shares are disjoint and cover the trace."""
    shares = [share(rows, worker, workers) for worker in range(workers)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(rows))


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=20).map(sorted),
    st.floats(0.01, 1000),
)
def test_release_times_keep_the_order_and_are_a_function_of_their_arguments(times, speed):
    """Scaling never reorders, and twice the same question gives the same answer."""
    arrival_s = np.array(times)
    due_s = release_times(arrival_s, speed)
    assert (np.diff(due_s) >= 0).all()
    assert due_s.tolist() == release_times(arrival_s, speed).tolist()


SESSIONS = FRAME.with_columns(
    pl.Series("session", ["a", "b", "a", None, "b"]),
    pl.Series("delay_s", [None, None, 2.0, 1.0, None]),
)


def test_a_turn_with_a_delay_waits_for_the_turn_before_it():
    """Row 2 for row 0, 2 s at any speed; row 3 has no session, row 4 a time of its own."""
    waiting = plan(SESSIONS, speed=2.0)
    assert waiting.after is not None
    assert waiting.pause_s is not None
    assert waiting.after.tolist() == [-1, -1, 0, -1, -1]
    assert waiting.pause_s[2] == 2.0
    assert plan(SESSIONS, speed=2.0, waits_for_answers=False).after is None
    assert plan(FRAME, speed=2.0).after is None


def test_a_session_stays_with_one_worker():
    """a, b and row 3 are three: a and row 3 to the first of two workers, positions within it."""
    assert share_of_sessions(SESSIONS, 0, 2).tolist() == [0, 2, 3]
    assert share_of_sessions(SESSIONS, 1, 2).tolist() == [1, 4]
    first = plan(SESSIONS, 1.0, 0, 2)
    assert first.after is not None
    assert first.request.tolist() == [0, 2, 3]
    assert first.after.tolist() == [-1, 0, -1]
