"""How much load does the endpoint take? Bisection, intervals, early stops, and whole searches."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest
from sse_server import Exchange, Server, good_stream, serving

from mooncake_bench.records import read_run
from mooncake_bench.replay.client import Progress
from mooncake_bench.replay.errors import ReplayError
from mooncake_bench.replay.options import ReplayOptions
from mooncake_bench.replay.overload import Overload, slope_t
from mooncake_bench.replay.recorder import FINISHED, Recorder, Verdict
from mooncake_bench.replay.schedule import Plan
from mooncake_bench.replay.search import (
    Probe,
    SearchInterrupted,
    bisect,
    conclude,
    interval,
    search,
    wilson,
)
from mooncake_bench.slo import Slo
from workloads.model import Trace, build_frame

MODELS = {"/v1/models": {"data": [{"id": "small"}]}}


def a_probe(value: float, attainment: float, **changes) -> Probe:
    known = Probe(
        value=value,
        speed=value,
        rate_rps=value,
        offered=100,
        finished=100,
        rejected=0,
        failed=0,
        attainment=attainment,
        low=attainment,
        high=attainment,
        effective_requests=100.0,
        goodput_rps=1.0,
        ttft_p99_s=0.1,
        holds=attainment >= 0.9,
        is_clear=True,
        valid=True,
        invalid_reasons=[],
        stopped="",
        salt="x",
        directory="",
    )
    return msgspec.structs.replace(known, **changes)


def limited(capacity: float, asked: list[float]):
    """A system that holds up to `capacity`."""

    def probe(value: float) -> Probe:
        asked.append(value)
        return a_probe(value, 0.95 if value <= capacity else 0.5)

    return probe


def test_bisection_closes_in_on_the_capacity():
    """Between 1 and 16 with capacity 5: 4 (the geometric middle), 8, 5.657, ... to within 5 %."""
    asked: list[float] = []
    probes = bisect(limited(5.0, asked), 1.0, 16.0, 0.05)
    assert asked[:5] == [1.0, 16.0, 4.0, 8.0, 5.657]
    found = conclude("speed", 0.9, probes)
    assert found.capacity <= 5.0 < found.not_at
    assert found.not_at / found.capacity <= 1.05
    assert found.sentence.startswith(f"Capacity {found.capacity:g}x: 90 %")
    assert found.valid


def test_bounds_that_do_not_enclose_the_capacity_are_said():
    """Below the lowest: one probe. Above the highest: two."""
    asked: list[float] = []
    found = conclude("rate", 0.9, bisect(limited(0.5, asked), 1.0, 8.0, 0.05))
    assert (asked, found.capacity, found.not_at) == ([1.0], None, 1.0)
    assert "lower --search-from" in found.sentence
    found = conclude("rate", 0.9, bisect(limited(9.0, asked), 1.0, 8.0, 0.05))
    assert (asked[1:], found.capacity, found.not_at) == ([1.0, 8.0], 8.0, None)
    assert "raise --search-to" in found.sentence


def test_a_client_that_is_too_slow_finds_no_capacity():
    """A probe that failed and is invalid says nothing of the endpoint: the search ends there."""
    late = {"valid": False, "invalid_reasons": ["The client was late."]}
    slow = lambda value: a_probe(value, 1.0 if value < 2 else 0.1, **late)  # noqa: E731
    probes = bisect(slow, 1.0, 16.0, 0.05)
    assert len(probes) == 2
    found = conclude("speed", 0.9, probes)
    assert not found.valid
    assert found.sentence == "No capacity: the client gave in at 16x. The client was late."


def test_wilson_gives_the_published_interval():
    """8 of 10: 0.490 to 0.943 (Agresti and Coull 1998); bounds stay inside 0 to 1."""
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_requests_that_miss_together_count_for_fewer():
    """The same share missed in one stretch or evenly: the stretch tells much less."""
    even = np.tile([True] * 9 + [False], 40)
    clumped = np.sort(even)
    low, high, effective = interval(even)
    assert effective == 400
    assert (low, high) == wilson(0.9, 400)
    wide_low, wide_high, few = interval(clumped)
    assert few < 40
    assert wide_low < low < high < wide_high
    assert interval(np.ones(0, dtype=bool)) == (0.0, 1.0, 0.0)


def test_a_slope_is_measured_in_its_own_errors():
    """A line is certain, a flat one nothing, noise around no slope below 3."""
    x = np.arange(50.0)
    assert slope_t(x, 2 * x) == np.inf
    assert slope_t(x, np.ones(50)) == 0.0
    noise = np.random.default_rng(0).normal(size=50)
    assert abs(slope_t(x, noise)) < 3.0
    assert slope_t(x, x + noise) > 30.0


def a_watch(count: int, target: float = 0.9) -> tuple[Overload, Recorder]:
    """`count` requests, ten a second, to be answered within 1 s."""
    plan = Plan(
        request=np.arange(count),
        due_s=np.arange(count) / 10,
        input_tokens=np.full(count, 2),
        output_tokens=np.full(count, 1),
        hash_ids=pl.Series([[row] for row in range(count)]),
    )
    watch = Overload(plan, Slo(1.0, 0.1), {}, target, (0.0, 1e9))
    return watch, Recorder(plan.request, plan.due_s)


def answer(recorder: Recorder, row: int, ttft_s: float) -> None:
    from array import array

    at = row / 10 + ttft_s
    recorder.sent(row, row / 10)
    recorder.settle(Verdict(row, FINISHED, at, times=array("d", [at])))


def look(watch: Overload, recorder: Recorder, elapsed_s: float, in_flight: int) -> str:
    progress = Progress(elapsed_s, 1000, in_flight + 100, 100, 0, 0, 100)
    return watch.look(progress, recorder.drain())


def test_a_probe_ends_when_the_target_is_out_of_reach():
    """10 of 100 may miss: the tenth is borne, the eleventh ends it."""
    watch, recorder = a_watch(100)
    for row in range(10):
        answer(recorder, row, 2.0)
    assert look(watch, recorder, 3.0, 0) == ""
    answer(recorder, 10, 2.0)
    assert look(watch, recorder, 3.1, 0).startswith("11 of 100 requests missed")


def test_a_probe_ends_when_concurrency_and_ttft_keep_rising():
    """A TTFT that grows 0.1 s a second, 5 more in flight each second; level ones end nothing."""
    for growth, more, ends in ((0.1, 5, True), (0.0, 5, False), (0.1, 0, False)):
        watch, recorder = a_watch(1000)
        found = ""
        for tick in range(100):  # every tenth of a second: 100 misses are within reach
            answer(recorder, tick, 1.05 + growth * tick / 10)
            found = found or look(watch, recorder, tick / 10, int(tick / 10 * more))
        assert found.startswith("concurrency and TTFT keep rising") is ends
        assert bool(found) is ends


def a_trace(count: int, rate_rps: float) -> Trace:
    frame = build_frame(
        np.arange(count) / rate_rps,
        [600] * count,
        [2] * count,
        pl.Series(np.arange(2 * count)),
        np.full(count, 2),
    )
    return Trace(frame, "steady", "a" * 64, 512)


def one_at_a_time(service_s: float):
    """A server that works on one request at a time, in order: it takes 1 / service_s a second."""
    lock = asyncio.Lock()

    async def handler(exchange: Exchange) -> None:
        async with lock:
            await asyncio.sleep(service_s)
        await good_stream(exchange)

    return handler


def options(out: Path, **changes) -> ReplayOptions:
    known = {"search": "rate", "search_from": 10.0, "search_to": 160.0, "search_precision": 1.0}
    return ReplayOptions(
        **known
        | {"slo": "ttft<200ms", "out": str(out), "max_cpu": 9.0, "max_lag": 9.0, "max_stall": 9.0}
        | changes
    )


def test_a_search_finds_what_a_server_takes_and_goes_on_where_it_was(tmp_path):
    """Some 66 req/s at 15 ms each: 40 holds, 160 does not. A second search asks only what is not
    known."""
    said: list[Probe] = []
    with serving(Server(one_at_a_time(0.015), MODELS)) as server:
        trace = a_trace(60, 10.0)
        found = search(trace, server.url, options(tmp_path), said.append)
        sent = len(server.received)
        assert 40 <= found.capacity < found.not_at <= 160
        assert said == found.probes
        assert [one.value for one in said[:3]] == [10.0, 160.0, 40.0]
        over = next(one for one in said if one.value == 160.0)
        assert "out of reach" in over.stopped
        assert over.valid
        prompts = [str(body["prompt"][:8]) for body in server.bodies]
        assert len(set(prompts)) == len(prompts)  # No probe warms the cache for another.

        again = search(trace, server.url, options(tmp_path, search_precision=0.5))
        assert [one.reused for one in again.probes[: len(said)]] == [True] * len(said)
        assert len(server.received) - sent <= 60 * (len(again.probes) - len(said))
    written = json.loads((tmp_path / "search.json").read_bytes())
    assert written["capacity"] == again.capacity
    run = read_run(tmp_path / "rate-40")
    assert run.info.trace["salt"] == found.probes[2].salt
    assert run.info.trace["rate_rps"] == pytest.approx(40.0)
    stopped = read_run(tmp_path / "rate-160").info
    assert not stopped.valid
    assert stopped.invalid_reasons[0].startswith("The run was stopped early: ")


def test_ctrl_c_ends_a_search_and_keeps_its_probes(tmp_path):
    """SIGINT in the second probe: the first is used again by the next search, the second is not."""
    seen = [0]

    async def handler(exchange: Exchange) -> None:
        seen[0] += 1
        await good_stream(exchange)
        if seen[0] == 25:
            os.kill(os.getpid(), signal.SIGINT)

    trace = a_trace(20, 10.0)
    settings = {"search_from": 20.0, "search_to": 21.0, "slo": "ttft<9s"}
    with serving(Server(handler, MODELS)) as server:
        with pytest.raises(SearchInterrupted, match="interrupted at rate 21"):
            search(trace, server.url, options(tmp_path, **settings))
        assert not (tmp_path / "rate-21").exists()
        found = search(trace, server.url, options(tmp_path, **settings))
    assert [one.reused for one in found.probes] == [True, False]
    assert found.sentence.startswith("At least 21 req/s")


def test_a_rate_needs_a_duration(tmp_path):
    """All at one instant have no rate to be searched."""
    with pytest.raises(ReplayError, match="--search rate: all requests arrive at once"):
        search(a_trace(1, 1.0), "http://127.0.0.1:1", options(tmp_path))


PROFILE = """
name = "fast"
model = "made up"
node = "made up"
source = "made up"
error = "made up"
layers = 4
kv_bytes_per_token = 1000
device_kv_tokens = 1_000_000
dram_kv_tokens = 1_000_000
link_bytes_per_s = 100e9
chunk_factor = 1.2
[prefill]
base_s = 0.02
token_s = 1e-6
token2_s = 0.0
reused_token_s = 0.0
[decode]
base_s = 2e-3
sequence_s = 1e-5
context_token_s = 0.0
"""


def test_the_command_searches_the_live_cluster(tmp_path):
    """One prefill instance at 20 ms a request takes some 50 req/s: `replay --search rate` says so,
    in a table, a JSON and a run directory a probe."""
    profile, trace = tmp_path / "fast.toml", tmp_path / "trace.jsonl"
    profile.write_text(PROFILE)
    trace.write_text(
        "".join(
            json.dumps(
                {
                    "timestamp": row * 100,
                    "input_length": 600,
                    "output_length": 3,
                    "hash_ids": [2 * row, 2 * row + 1],
                }
            )
            + "\n"
            for row in range(80)
        )
    )
    command = [sys.executable, "-m", "mooncake_bench.cli"]
    serve = [*command, "serve", "--port", "0", "--prefill", "1", "--decode", "1"]
    server = subprocess.Popen(
        [*serve, "--admission", "accept-all", "--profile", str(profile)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        first = server.stderr.readline()
        url = first[first.index("http://") :].split()[0]
        done = subprocess.run(
            [
                *(*command, "replay", "--url", url, "--trace", str(trace), "--search", "rate"),
                *("--search-from", "20", "--search-to", "320", "--search-precision", "1"),
                *("--slo", "ttft<300ms,tbt<1s", "--out", str(tmp_path / "out"), "--max-cpu", "9"),
                *("--max-lag", "9", "--max-stall", "9"),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        server.terminate()
        server.wait(10)
    assert done.returncode == 0, done.stderr
    assert "Capacity " in done.stdout
    found = json.loads((tmp_path / "out" / "search.json").read_bytes())
    assert 20 <= found["capacity"] < 100
    for probe in found["probes"]:
        assert read_run(Path(probe["directory"])).summary["offered"] == probe["offered"]
