"""What is known of each kind of server."""

import polars as pl
import pytest

from mooncake_bench.records import REQUESTS, SERVER_METRICS
from mooncake_bench.replay.options import flags, options_from
from mooncake_bench.replay.servers import SERVERS, warnings_about
from mooncake_bench.server_gauges import GAUGES


def some_requests(reused_tokens: int | None) -> pl.DataFrame:
    schema = {name: REQUESTS[name] for name in ("status", "reused_tokens")}
    return pl.DataFrame([("finished", reused_tokens)], schema=schema, orient="row")


def some_metrics(*names: str) -> pl.DataFrame:
    rows = [(0.0, name, "", 1.0) for name in names]
    return pl.DataFrame(rows, schema=SERVER_METRICS, orient="row")


@pytest.mark.parametrize(
    ("server", "endpoint", "sends_tokens"),
    [
        ("", "completions", True),
        ("vllm", "completions", True),
        ("sglang", "completions", True),
        ("dynamo", "completions", True),
        ("tgi", "completions", False),
        ("vllm", "chat", False),
    ],
)
def test_prompts_are_token_ids_where_the_server_takes_them(server, endpoint, sends_tokens):
    """TGI's prompts are text; so are those of a chat anywhere."""
    options = options_from({"server": server, "endpoint": endpoint})
    assert options.sends_tokens is sends_tokens


def test_a_server_that_tells_all_gets_no_warning():
    """Its cached tokens and its own metrics are there."""
    told = warnings_about(SERVERS["vllm"], some_requests(0), some_metrics("vllm:prompt_tokens"))
    assert told == []


def test_what_a_server_could_have_told_is_said_with_the_flag_that_makes_it():
    """One line each: cached tokens, and metrics; not asked for, they are not missed."""
    silent, others = some_requests(None), some_metrics("python_info")
    assert warnings_about(SERVERS["sglang"], silent, others) == [
        "SGLang did not say how many tokens it had cached; start it with --enable-cache-report.",
        "/metrics has no sglang:* of SGLang; start it with --enable-metrics.",
    ]
    assert len(warnings_about(SERVERS["sglang"], silent, None)) == 1


def test_every_server_has_gauges_of_running_and_waiting_requests():
    """The report draws them under one title, whatever the server calls them."""
    for server in SERVERS.values():
        for gauge in GAUGES[:2]:
            assert any(name.startswith(server.metrics) for name in gauge.names)


def test_a_server_is_one_of_the_flags_words():
    """The table and the flag do not drift apart."""
    choices = next(flag.choices for flag in flags() if flag.field == "server")
    assert sorted(filter(None, choices)) == sorted(SERVERS)
