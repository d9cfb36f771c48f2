"""Sessions, closed loops, salts, classes, retries, warm-up: what a replay makes of its options."""

import asyncio
import json

import msgspec
import numpy as np
import polars as pl
import pytest
from sse_server import Exchange, Server, good_stream, serving

from mooncake_bench.records import SERVER_METRICS, read_run
from mooncake_bench.replay.errors import ReplayError
from mooncake_bench.replay.options import ReplayOptions
from mooncake_bench.replay.prepare import load_trace
from mooncake_bench.replay.run import ReplayResult, replay, write
from workloads.model import Trace, build_frame

MODELS = {"/v1/models": {"data": [{"id": "small"}]}}
CALM = {"max_cpu": 9.0, "max_lag": 9.0, "max_stall": 9.0}


def a_trace(arrival_s: list[float], **extra: list) -> Trace:
    count = len(arrival_s)
    frame = build_frame(
        arrival_s, [600] * count, [3] * count, pl.Series(np.arange(2 * count)),
        np.full(count, 2), extra,
    )  # fmt: skip  # one argument a line would hide them
    return Trace(frame, "made-up", "a" * 64, 512)


def sent_to(server: Server, trace: Trace, **options) -> ReplayResult:
    return replay(trace, server.url, ReplayOptions(**CALM | options))


def test_the_next_turn_waits_for_the_answer_and_its_pause():
    """Turns of one session 0.1 s after each other's end, although all are due at once; the session
    beside it does not wait for them."""

    async def handler(exchange: Exchange) -> None:
        await good_stream(exchange, gap_s=0.05)

    trace = a_trace(
        [0.0, 0.0, 0.0, 0.05],
        session=["a", "a", "a", "b"],
        delay_s=[None, 0.1, 0.1, None],
    )
    with serving(Server(handler, MODELS)) as server:
        requests = sent_to(server, trace).requests
        assert server.received == [0, 3, 1, 2]
        ends = requests["finished_s"].to_list()
        arrivals = requests["arrival_s"].to_list()
        # An answer has ended with its [DONE], a moment after its last token.
        assert 0.1 <= arrivals[1] - ends[0] < 5.0
        assert 0.1 <= arrivals[2] - ends[1] < 5.0
        assert arrivals[3] == 0.05
        server.received.clear()
        alone = sent_to(server, trace, sessions=False).requests
    assert alone["arrival_s"].to_list() == [0.0, 0.0, 0.0, 0.05]


def test_a_closed_loop_keeps_so_many_under_way():
    """Nine requests two at a time: never three at once, though all are due at 0 s."""
    under_way = [0, 0]

    async def handler(exchange: Exchange) -> None:
        under_way[0] += 1
        under_way[1] = max(under_way)
        await asyncio.sleep(0.02)
        await good_stream(exchange)
        under_way[0] -= 1

    with serving(Server(handler, MODELS)) as server:
        result = sent_to(server, a_trace([0.0] * 9), concurrency=2)
    assert under_way[1] == 2
    assert result.requests["status"].to_list() == ["finished"] * 9
    assert result.requests["arrival_s"].max() > 0.05


def prompts(server: Server) -> list:
    return [body.get("prompt", body.get("messages")) for body in server.bodies]


def test_a_salt_changes_all_prompts_alike_and_is_recorded(tmp_path):
    """None twice: the same tokens. `run`: others each time, shared blocks still shared."""
    trace = a_trace([0.0, 0.1])
    same = trace.frame.with_columns(hash_ids=pl.Series([[1, 2], [1, 3]]))
    trace = Trace(same, trace.name, trace.sha256, 512)
    with serving(Server(good_stream, MODELS)) as server:
        runs = []
        for options in ({}, {}, {"salt": "run", "cache_salt": True}, {"salt": "run"}):
            result = sent_to(server, trace, **options)
            info = write(result, trace, ReplayOptions(**options), tmp_path / "run").info
            runs.append((prompts(server), server.bodies[0].get("cache_salt"), info.trace["salt"]))
            assert info.config["replay"]["salt"] == info.trace["salt"]
            server.bodies.clear()
    first, again, salted, other = runs
    assert first == again == (first[0], None, "none")
    assert salted[1] == salted[2] != other[2]
    assert other[1] is None
    tokens = {tuple(run[0][0][:512]) for run in (first, salted, other)}
    assert len(tokens) == 3
    for found, _, _ in runs:
        assert found[0][:512] == found[1][:512]
        assert found[0][512] != found[1][512]


def test_literal_prompts_are_sent_as_they_are():
    """Text to completions, messages to chat; a salt becomes their first line."""
    chat = [{"role": "user", "content": 'say "x"'}]
    literal = [json.dumps("what is it?"), json.dumps(chat)]
    with serving(Server(good_stream, MODELS)) as server:
        sent_to(server, a_trace([0.0], prompt=literal[:1]))
        sent_to(server, a_trace([0.0, 0.1], prompt=literal), endpoint="chat", salt="pepper")
        found = prompts(server)
        with pytest.raises(ReplayError, match="messages of a chat; add --endpoint chat"):
            sent_to(server, a_trace([0.0, 0.1], prompt=literal))
    assert found == [
        "what is it?",
        [{"role": "user", "content": "pepper\nwhat is it?"}],
        [{"role": "user", "content": 'pepper\nsay "x"'}],
    ]


def test_classes_have_their_own_bounds_in_headers_and_in_the_summary(tmp_path):
    """chat must be quick and is not; batch need not be: 0 and 1 attained, one of two overall."""
    bounds = {}

    async def handler(exchange: Exchange) -> None:
        bounds[exchange.number] = (
            exchange.headers["x-slo-ttft-ms"],
            exchange.headers["x-slo-tpot-ms"],
        )
        await asyncio.sleep(0.05)
        await good_stream(exchange)

    trace = a_trace([0.0, 0.0, 0.1], **{"class": ["chat", "batch", None]})
    options = ReplayOptions(
        slo="ttft<5s,tbt<1s;chat:ttft<10ms,tbt<50ms;batch:ttft<60s", slo_headers=True, **CALM
    )
    with serving(Server(handler, MODELS)) as server:
        result = replay(trace, server.url, options)
    write(result, trace, options, tmp_path)
    run = read_run(tmp_path)
    assert bounds == {0: ("10", "50"), 1: ("60000", "1000"), 2: ("5000", "1000")}
    assert run.requests["class"].to_list() == ["chat", "batch", None]
    by_class = run.summary["by_class"]
    assert (by_class["chat"]["attainment"], by_class["batch"]["attainment"]) == (0.0, 1.0)
    assert by_class["batch"]["slo"] == {"ttft_s": 60.0, "tbt_s": 1.0}
    assert run.summary["attainment"] == pytest.approx(2 / 3)
    assert run.summary["missed_by"]["late_first_token"] == 1


def test_retries_are_attempts_and_not_offers(tmp_path):
    """Refused once with Retry-After 1 s, then served: one offer, two attempts; without
    retries it is one rejection, and its Retry-After is kept."""
    seen = []

    async def handler(exchange: Exchange) -> None:
        seen.append(exchange.number)
        if len(seen) % 2:
            await exchange.plain(429, b'{"error": {"reason": "ttft"}}', b"Retry-After: 1")
        else:
            await good_stream(exchange)

    trace = a_trace([0.0])
    with serving(Server(handler, MODELS)) as server:
        again = sent_to(server, trace, retry="backoff")
        none = sent_to(server, trace)
    summary = write(again, trace, ReplayOptions(), tmp_path / "a").summary
    accounts = summary["accounting"]
    assert (accounts["offered"], accounts["attempts"], accounts["finished"]) == (1, 2, 1)
    assert again.requests["finished_s"][0] > 1.0
    summary = write(none, trace, ReplayOptions(), tmp_path / "b").summary
    accounts = summary["accounting"]
    assert (accounts["attempts"], accounts["rejected_early"]) == (1, 1)
    assert summary["retry_after_s"]["mean"] == 1.0
    assert summary["time_to_rejection_s"]["p50"] < 5


def test_warm_up_and_cool_down_are_sent_and_not_counted(tmp_path):
    """Of six requests, 0.1 s apart, those before 0.15 s and the last 0.15 s are left out."""
    trace = a_trace([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    options = ReplayOptions(warmup=0.15, cooldown=0.15, **CALM)
    with serving(Server(good_stream, MODELS)) as server:
        result = replay(trace, server.url, options)
        with pytest.raises(ReplayError, match=r"--warmup 0.4 and --cooldown 0.3: no request"):
            replay(trace, server.url, ReplayOptions(warmup=0.4, cooldown=0.3))
    run = write(result, trace, options, tmp_path)
    assert run.requests.height == 6
    assert run.summary["offered"] == 2
    assert run.summary["measured"] == {"start_s": 0.15, "end_s": 0.35, "excluded": 4}
    assert read_run(tmp_path).info.measured_s == (0.15, 0.35)


def test_the_servers_metrics_are_kept_on_the_clock_of_the_requests(tmp_path):
    """Read at the start, every second and at the end; what does not change is one row."""
    requests = [0]

    async def handler(exchange: Exchange) -> None:
        requests[0] += 1
        await good_stream(exchange)

    server = Server(handler, MODELS)
    answer = server._answer

    async def with_metrics(head, reader, writer):
        if head.startswith("GET /metrics"):
            text = b'# HELP x\nvllm:request_success_total{reason="stop"} %d\nvllm:up 1\n'
            await Exchange("/metrics", {}, {}, writer).plain(200, text % requests[0])
        else:
            await answer(head, reader, writer)

    server._answer = with_metrics
    trace = a_trace([0.0, 0.2])
    with serving(server):
        result = sent_to(server, trace)
    write(result, trace, ReplayOptions(), tmp_path)
    frame = pl.read_parquet(tmp_path / "server_metrics.parquet")
    assert dict(frame.schema) == SERVER_METRICS
    counts = frame.filter(pl.col("name") == "vllm:request_success_total")
    assert counts["labels"][0] == 'reason="stop"'
    assert (counts["value"][0], counts["value"][-1]) == (0.0, 2.0)
    assert counts["time_s"][0] == 0.0
    assert counts["time_s"][-1] >= result.requests["finished_s"].max()
    assert frame.filter(pl.col("name") == "vllm:up").height == 1


def test_arrivals_of_another_process_are_a_transform(tmp_path):
    """`--arrivals constant:rate_rps=20` on a file: 50 ms apart, noted in the trace."""
    path = tmp_path / "trace.jsonl"
    row = {"timestamp": 0, "input_length": 3, "output_length": 3, "hash_ids": [1]}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    trace = load_trace(ReplayOptions(trace=str(path), arrivals="constant:rate_rps=20"))
    assert trace.frame["arrival_s"].to_list() == [0.0, 0.05, 0.1, 0.15]
    assert trace.transforms == ("constant arrivals, rate_rps 20",)


def test_a_client_without_free_files_is_no_slow_server():
    """Connections that our own side could not open make a run invalid, with the remedy."""
    from mooncake_bench.replay.assemble import judge
    from mooncake_bench.replay.schedule import plan

    trace = a_trace([0.0, 0.1])
    requests = pl.DataFrame(
        {
            "request": [0, 1],
            "arrival_s": [0.0, 0.1],
            "sent_s": [None, 0.1],
            "finished_s": [0.1, 0.2],
            "input_tokens": [600, 600],
            "output_tokens": [0, 3],
            "output_tokens_asked": [3, 3],
            "status": ["failed", "finished"],
            "reason": ["connect failed: Too many open files", None],
        }
    )
    client, invalid, _ = judge(ReplayOptions(), plan(trace.frame, 1.0), requests, [])
    assert client["connections_failed"] == {"connect failed: Too many open files": 1}
    assert len(invalid) == 1
    assert "could not open connections for 1 requests" in invalid[0]
    assert "ulimit -n" in invalid[0]


def test_options_travel_whole_to_workers():
    """The settled salt is in what a Locust worker gets."""
    from mooncake_bench.replay.options import settle_salt

    options = settle_salt(ReplayOptions(salt="run"))
    assert len(options.salt) == 16
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(options), type=ReplayOptions)
    assert again == options
    assert settle_salt(options) == options
