"""What did the server say of itself during the run?"""

import time

import pytest
from sse_server import Exchange, Server, good_stream, serving

from mooncake_bench.replay.scrape import Scraper, parse_metrics

PAGE = """
# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a b} {c"} 3.0
vllm:time_to_first_token_seconds_bucket{le="0.1"} 4
vllm:time_to_first_token_seconds_sum 1.5e2
vllm:time_to_first_token_seconds_count 7 1700000000000
process_created 1.7e9
broken line here
half_created 2
bad{x="y"} NaN
"""


def test_samples_of_the_text_format():
    """Labels as written, stamps and buckets left out, what is no sample too."""
    assert list(parse_metrics(PAGE)) == [
        ("vllm:num_requests_running", 'engine="0",model_name="a b} {c"', 3.0),
        ("vllm:time_to_first_token_seconds_sum", "", 150.0),
        ("vllm:time_to_first_token_seconds_count", "", 7.0),
    ]


def a_server_with_metrics() -> Server:
    """Each look at its page counts one more."""
    server, looks = Server(good_stream), [0]
    answer = server._answer

    async def with_metrics(head, reader, writer):
        if not head.startswith("GET /metrics"):
            await answer(head, reader, writer)
            return
        looks[0] += 1
        await Exchange("", {}, {}, writer).plain(200, b"looks %d\nup 1\n" % looks[0])

    server._answer = with_metrics  # type: ignore[method-assign]
    return server


def test_what_changes_is_a_row_and_the_number_of_rows_is_bounded():
    """`up` once, `looks` each time; cut at five rows, and known to be."""
    with serving(a_server_with_metrics()) as server:
        scraper = Scraper(server.url + "/", {}, every_s=0.02, rows=5)
        start = time.perf_counter() + 0.01
        scraper.start()
        for _ in range(200):
            if scraper.is_cut:
                break
            time.sleep(0.02)
        scraper.stop()
    frame = scraper.frame(start)
    assert scraper.is_cut
    assert frame["name"].to_list() == ["looks", "up", "looks", "looks", "looks"]
    assert frame["value"].to_list() == [1.0, 1.0, 2.0, 3.0, 4.0]
    assert frame["time_s"].to_list() == sorted(frame["time_s"])
    assert frame["time_s"][0] == 0.0


@pytest.mark.parametrize("is_up", [True, False])
def test_a_server_without_the_page_gives_no_rows(is_up):
    """404, or nobody there: an empty frame, no error."""
    with serving(Server(good_stream)) as server:
        url = server.url
        if is_up:
            scraper = Scraper(url + "/", {})
            scraper.start()
            scraper.stop()
    if not is_up:
        scraper = Scraper(url + "/", {})
        scraper.start()
        scraper.stop()
    assert scraper.frame(0.0).is_empty()
