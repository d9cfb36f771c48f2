"""What servers say of themselves, under their several names."""

import polars as pl

from mooncake_bench.records import SERVER_METRICS
from mooncake_bench.server_gauges import GAUGES, over_time

RUNNING, WAITING, CACHE = GAUGES


def said(*rows: tuple[float, str, str, float]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=SERVER_METRICS, orient="row")


def test_counts_of_instances_add_up_and_hold_until_they_change():
    """Instance 1 comes a second later; nothing changes from then to the end at 5 s."""
    name = "vllm:num_requests_running"
    frame = said(
        (0.0, name, 'engine="0"', 2.0),
        (1.0, name, 'engine="1"', 3.0),
        (2.0, name, 'engine="0"', 1.0),
        (5.0, "other", "", 1.0),
    )
    assert over_time(frame, RUNNING).rows() == [(0.0, 2.0), (1.0, 5.0), (2.0, 4.0), (5.0, 4.0)]


def test_shares_of_instances_are_averaged_whatever_the_server_calls_them():
    """SGLang's name; vLLM's older and newer ones are other entries of the same list."""
    frame = said((0.0, "sglang:token_usage", "a", 0.2), (0.0, "sglang:token_usage", "b", 0.6))
    assert over_time(frame, CACHE)["value"].to_list() == [0.4, 0.4]


def test_a_server_that_says_nothing_gives_no_rows():
    """Neither an empty page nor one of other metrics is a gauge."""
    assert over_time(said(), WAITING).is_empty()
    assert over_time(said((0.0, "up", "", 1.0)), WAITING).is_empty()
