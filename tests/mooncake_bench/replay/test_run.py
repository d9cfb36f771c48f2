"""The whole replay of `mooncake-bench replay`: a trace in, a run directory out."""

import os
import signal
import threading
import time

import msgspec
import numpy as np
import polars as pl
import pytest
from sse_server import STREAM_HEAD, Exchange, Server, good_stream, serving

from mooncake_bench.opened import open_run
from mooncake_bench.records import RunInfo, read_run
from mooncake_bench.replay.errors import ReplayError
from mooncake_bench.replay.live_run import LiveRun
from mooncake_bench.replay.options import ReplayOptions
from mooncake_bench.replay.run import replay, write
from mooncake_bench.replay.schedule import plan
from mooncake_bench.replay.target import find_target
from mooncake_bench.slo import SloError
from workloads.model import Trace, build_frame
from workloads.prompts import prompt_token_ids

MODELS = {"/v1/models": {"data": [{"id": "small"}]}}


def a_trace(arrival_s: list[float], output_tokens: int = 3) -> Trace:
    count = len(arrival_s)
    frame = build_frame(
        arrival_s,
        [600] * count,
        [output_tokens] * count,
        pl.Series(np.arange(2 * count)),
        np.full(count, 2),
    )
    return Trace(frame, "made-up", "a" * 64, 512)


def test_a_replay_of_another_server_becomes_a_run_directory(tmp_path):
    """Prompts, counts, schedule and description; no timeline is asked of a stranger."""
    trace = a_trace([0.0, 0.0, 0.4, 0.8])
    options = ReplayOptions(speed=2.0, slo="ttft<1s,tbt<1s", name="mine")
    progress = []
    with serving(Server(good_stream, MODELS)) as server:
        result = replay(trace, server.url, options, progress.append)
    assert sorted(server.received) == [0, 1, 2, 3]
    body = server.bodies[server.received.index(2)]
    assert body["prompt"] == prompt_token_ids(trace.sha256, [4, 5], 600, 512)
    assert (body["model"], body["stream_options"]) == ("small", {"include_usage": True})
    assert result.requests["arrival_s"].to_list() == [0.0, 0.0, 0.2, 0.4]
    assert (progress[-1].finished, progress[-1].in_flight, progress[-1].tokens) == (4, 0, 12)

    write(result, trace, options, tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert (run.info.name, run.info.source, run.info.system) == ("mine", "external", "external")
    assert run.info.config["replay"]["speed"] == 2.0
    assert (run.summary["offered"], run.summary["finished"]) == (4, 4)
    assert run.summary["client_cpu"] == run.info.client["cpu"]
    assert run.samples.is_empty()


def test_a_named_server_is_told_what_it_left_out():
    """Its /metrics are of something else: one warning, with the remedy."""
    with serving(Server(good_stream, MODELS)) as server:
        result = replay(a_trace([0.0]), server.url, ReplayOptions(server="vllm"))
    assert [line for line in result.warnings if "vLLM" in line] == [
        "/metrics has no vllm:* of vLLM; start it without --disable-log-stats."
    ]


def test_our_own_cluster_tells_its_timeline_and_samples():
    """Stamps go onto the client's clock; so do samples, by the pings before the run."""
    ahead_s = 500.0  # How far the server's clock is from ours.

    async def handler(exchange: Exchange) -> None:
        assert exchange.body["stream_options"]["include_timeline"]
        await exchange.raw(STREAM_HEAD + b"\r\n")
        await exchange.event({"choices": [{"text": "a"}]})
        timeline = {"placed_s": 0.0, "prefill": "prefill-1", "decode": "decode-0"}
        usage = {"prompt_tokens": 600, "completion_tokens": 3}
        await exchange.event({"choices": [], "usage": usage, "timeline": timeline})
        await exchange.chunk(b"data: [DONE]\n\n")
        await exchange.raw(b"0\r\n\r\n")

    def samples() -> dict:
        now_s = time.perf_counter() + ahead_s
        row = ["prefill-1", "prefill", 0.5, 1, 2, 3, 4, 5, 6.0, 7]
        return {"now_s": now_s, "samples": [[ahead_s - 9.0, *row], [now_s, *row]]}

    config = {"prefill": 2}
    info = {"system": "disaggregated", "source": "live-modelled", "config": config, "profile": {}}
    controls = MODELS | {"/cluster/info": info, "/cluster/samples": samples}
    before = time.perf_counter()
    with serving(Server(handler, controls)) as server:
        result = replay(a_trace([0.0, 0.1]), server.url, ReplayOptions())
    took_s = time.perf_counter() - before
    row = result.requests.row(0, named=True)
    assert (row["placed_s"], row["prefill"], row["decode"]) == (
        row["sent_s"],
        "prefill-1",
        "decode-0",
    )
    # The sample from before the run is left out; the other one was taken in it, or just after.
    assert result.samples.height == 1
    assert 0.0 <= result.samples["time_s"][0] <= took_s
    assert result.info == info


def test_a_replay_shows_the_clusters_samples_while_it_goes_on(tmp_path):
    """Each of them once, whether or not the server leaves out those of before."""
    row = ["prefill-1", "prefill", 0.5, 1, 2, 3, 4, 5, 6.0, 7]
    rows = [[10.0, *row], [11.0, *row]]
    controls = MODELS | {
        "/cluster/info": {"system": "disaggregated"},
        "/cluster/samples": lambda: {"now_s": time.perf_counter(), "samples": rows},
    }
    whole = plan(a_trace([0.0]).frame, 1.0)
    with serving(Server(good_stream, controls)) as server:
        live = LiveRun(tmp_path, RunInfo(name="a", source="external", system="external"), whole)
        target = msgspec.structs.replace(find_target(server.url), clock_ahead_s=0.0)
        live.follow(target, 10.5)
        live.add(None)
        assert open_run(tmp_path).samples["time_s"].to_list() == [0.5]
        rows.append([12.0, *row])
        live._sample_at_s = 0.0
        live.add(None)
    assert open_run(tmp_path).samples["time_s"].to_list() == [0.5, 1.5]
    live._sample_at_s = 0.0
    live.add(None)  # A server that has gone costs the samples, no more.
    live.close()


def test_what_cannot_be_replayed_is_one_line_at_once():
    """Down, wrong address, wrong SLO: before any request is sent."""
    server = Server(good_stream)
    with serving(server):
        pass
    with pytest.raises(ReplayError, match=r"nothing answers there .* start the server"):
        replay(a_trace([0.0]), server.url, ReplayOptions())
    with pytest.raises(ReplayError, match="write it like"):
        replay(a_trace([0.0]), "127.0.0.1:8000", ReplayOptions())
    with pytest.raises(SloError):
        replay(a_trace([0.0]), server.url, ReplayOptions(slo="fast"))


def test_a_server_without_a_list_of_models_can_be_replayed():
    """The name matters to few of them; --model gives it."""
    with serving(Server(good_stream)) as server:
        assert replay(a_trace([0.0]), server.url, ReplayOptions()).model == "default"
        named = replay(a_trace([0.0]), server.url + "/v1/", ReplayOptions(model="m"))
    assert named.model == "m"
    assert [body["model"] for body in server.bodies] == ["default", "m"]


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    """SIGINT while a request far in the future is waited for: one finished, the run invalid."""

    async def handler(exchange: Exchange) -> None:
        await good_stream(exchange)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    trace = a_trace([0.0, 900.0])
    before = signal.getsignal(signal.SIGINT)  # A job in the background begins with it ignored.
    with serving(Server(handler, MODELS)) as server:
        result = replay(trace, server.url, ReplayOptions())
    assert result.requests["status"].to_list() == ["finished"]
    assert not result.valid
    assert any("1 of 2 requests" in reason for reason in result.invalid_reasons)
    assert signal.getsignal(signal.SIGINT) is before
    assert write(result, trace, ReplayOptions(), tmp_path / "run").summary["offered"] == 1


def test_a_token_is_taken_from_the_environment_and_never_written(tmp_path, monkeypatch):
    """It goes into every header, and into no file of the run."""
    seen = []

    async def handler(exchange: Exchange) -> None:
        seen.append(exchange.headers["authorization"])
        await good_stream(exchange)

    monkeypatch.setenv("MOONCAKE_BENCH_TOKEN", "sesame-123")
    trace = a_trace([0.0])
    with serving(Server(handler, MODELS)) as server:
        result = replay(trace, server.url, ReplayOptions())
    assert seen == ["Bearer sesame-123"]
    write(result, trace, ReplayOptions(), tmp_path)
    assert all(b"sesame" not in path.read_bytes() for path in tmp_path.iterdir())
    monkeypatch.setenv("MOONCAKE_BENCH_TOKEN", "a\r\nb")
    with pytest.raises(ReplayError, match="MOONCAKE_BENCH_TOKEN"):
        replay(trace, server.url, ReplayOptions())
