"""The engine against servers that behave, and against servers that do not."""

import asyncio
import time

import numpy as np
import polars as pl
import pytest
from sse_server import STREAM_HEAD, Exchange, Server, good_stream

from mooncake_bench.replay.assemble import build_frames
from mooncake_bench.replay.bodies import BuildAhead
from mooncake_bench.replay.client import Address, Engine, Timeouts
from mooncake_bench.replay.errors import ReplayError
from mooncake_bench.replay.run import loop_factory
from mooncake_bench.replay.schedule import Plan

FAST = Timeouts(connect_s=2.0, first_token_s=0.4, stall_s=0.4, total_s=1.2)
PATIENT = Timeouts()


def a_plan(due_s: list[float], output_tokens: int = 3) -> Plan:
    count = len(due_s)
    return Plan(
        request=np.arange(count),
        due_s=np.array(due_s),
        input_tokens=np.full(count, 2),
        output_tokens=np.full(count, output_tokens),
        hash_ids=pl.Series([[row] for row in range(count)]),
    )


def a_request(row: int, tokens: int = 3, size: int = 0) -> bytes:
    body = b'{"prompt":[1,2],"max_tokens":%d%s}' % (tokens, b" " * size)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: %d\r\n" % row
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def send(server: Server, plan: Plan, timeouts: Timeouts = PATIENT, **settings):
    """Run an engine over the plan; (engine, its stats, the requests frame, the spans frame)."""
    bodies = BuildAhead(a_request, len(plan), 1 << 20)
    bodies.start()
    engine = Engine(plan, bodies, Address("127.0.0.1", server.port), timeouts, **settings)
    try:
        stats = await engine.run(time.perf_counter() + 0.15)
    finally:
        bodies.stop()
    batch = engine.recorder.drain()
    return engine, stats, *build_frames(plan, [batch] if batch else [])


def run(main):
    """The coroutine on the loop that the product uses."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(main)


def outcome(handler, count: int = 3, timeouts: Timeouts = FAST) -> pl.DataFrame:
    """What becomes of `count` requests, sent 20 ms apart, that `handler` answers."""

    async def main():
        async with Server(handler).running() as server:
            plan = a_plan([0.02 * row for row in range(count)])
            _, _, requests, _ = await send(server, plan, timeouts)
            assert sorted(server.received) == list(range(count))
            return requests

    requests = run(main())
    stamps = requests.select("sent_s", "first_token_s", "finished_s").drop_nulls()
    assert (stamps["sent_s"] <= stamps["finished_s"]).all()
    return requests


def statuses(requests: pl.DataFrame) -> set[tuple[str, str | None, int | None]]:
    return set(requests.select("status", "reason", "http_status").rows())


def test_every_row_is_sent_once_at_its_time_and_every_token_has_a_gap():
    """Two bursts of ten; each request of 3 tokens leaves two gaps that end at its finish."""

    async def main():
        async with Server(good_stream).running() as server:
            plan = a_plan([0.0] * 10 + [1.0] * 10)
            _, stats, requests, spans = await send(server, plan)
            return server, stats, requests, spans

    server, stats, requests, spans = run(main())
    assert sorted(server.received) == list(range(20))
    assert statuses(requests) == {("finished", None, 200)}
    assert (requests["sent_s"] >= requests["arrival_s"]).all()
    assert requests["output_tokens"].to_list() == [3] * 20
    assert spans.group_by("request").len()["len"].to_list() == [2] * 20
    ends = spans.with_columns(end_s=pl.col("start_s") + pl.col("first_gap_s"))
    last = ends.group_by("request", maintain_order=True).agg(pl.col("end_s").last())
    assert last["end_s"].to_list() == pytest.approx(requests["finished_s"].to_list())
    assert server.connections == stats.connections + 1  # and the look before the start
    # Ten ahead; after a slow start ten on demand as well, which the second burst finds.
    assert stats.connections <= 20


@pytest.mark.parametrize(
    ("status", "headers", "body", "reason"),
    [
        (429, [b"Retry-After: 1", b"X-Rejection-Reason: ttft"], b"{}", "ttft"),
        (429, [], b'{"error": {"reason": "tbt", "type": "early_rejection"}}', "tbt"),
        (429, [b"Retry-After: 3"], b'{"error": {"type": "rate_limit"}}', "rate_limit"),
        (429, [], b"", "http 429"),
        (503, [], b'{"error": "overloaded"}', "overloaded"),
        (529, [], b"<html>busy</html>", "http 529"),
    ],
)
def test_a_refusal_is_a_rejection_with_its_reason_and_time(status, headers, body, reason):
    """429, 503 and 529 are results: not failures, never sent again."""

    async def handler(exchange: Exchange) -> None:
        await exchange.plain(status, body, *headers)

    requests = outcome(handler)
    assert statuses(requests) == {("rejected", reason, status)}
    assert requests["finished_s"].null_count() == 0
    assert requests["first_token_s"].null_count() == 3


async def stalls(exchange: Exchange) -> None:
    await exchange.raw(STREAM_HEAD + b"\r\n")
    await exchange.event({"choices": [{"text": "a"}]})
    await asyncio.sleep(5)


async def never_answers(exchange: Exchange) -> None:
    await asyncio.sleep(5)


async def never_ends(exchange: Exchange) -> None:
    await exchange.raw(STREAM_HEAD + b"\r\n")
    for _ in range(40):
        await exchange.event({"choices": [{"text": "a"}]})
        await asyncio.sleep(0.1)


async def comments_only(exchange: Exchange) -> None:
    await exchange.raw(STREAM_HEAD + b"\r\n")
    for _ in range(30):
        await exchange.chunk(b": keep-alive\n\n")
        await asyncio.sleep(0.1)


async def resets(exchange: Exchange) -> None:
    exchange.hang_up()


async def closes_inside_head(exchange: Exchange) -> None:
    await exchange.raw(b"HTTP/1.1 200")
    exchange.writer.close()


async def cuts_the_stream(exchange: Exchange) -> None:
    await exchange.raw(STREAM_HEAD + b"\r\n")
    await exchange.event({"choices": [{"text": "a"}]})
    exchange.hang_up()


async def ends_without_done(exchange: Exchange) -> None:
    await exchange.raw(STREAM_HEAD + b"\r\n")
    await exchange.event({"choices": [{"text": "a"}]})
    await exchange.raw(b"0\r\n\r\n")


async def garbage(exchange: Exchange) -> None:
    await exchange.raw(b"\x00\x01 what is this\r\n\r\n")


async def garbage_events(exchange: Exchange) -> None:
    await exchange.raw(STREAM_HEAD + b"\r\n")
    await exchange.chunk(b"data: not json\n\n")


async def error_after_200(exchange: Exchange) -> None:
    await exchange.raw(STREAM_HEAD + b"\r\n")
    await exchange.event({"choices": [{"text": "a"}]})
    await exchange.event({"error": {"message": "engine died", "type": ""}})
    await exchange.chunk(b"data: [DONE]\n\n")
    await exchange.raw(b"0\r\n\r\n")


async def breaks_down(exchange: Exchange) -> None:
    await exchange.plain(500, b'{"error": {"message": "boom"}}')


async def does_not_stream(exchange: Exchange) -> None:
    await exchange.plain(200, b'{"choices": []}', b"Content-Type: application/json")


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (stalls, "no token for 0.4 s"),
        (never_answers, "no first token within 0.4 s"),
        (comments_only, "no first token within 0.4 s"),
        (never_ends, "no end within 1.2 s"),
        (resets, "before the response"),
        (closes_inside_head, "before the response"),
        (cuts_the_stream, "stream cut before [DONE]"),
        (ends_without_done, "stream cut before [DONE]"),
        (garbage, "bad response: not HTTP/1.1"),
        (garbage_events, "bad stream: an event holds no JSON object"),
        (error_after_200, "error in the stream: engine died"),
        (breaks_down, "http 500: boom"),
        (does_not_stream, "no stream but application/json"),
    ],
)
def test_each_way_to_fail_is_counted_as_what_it_is(handler, reason):
    """No exception, no hang: a failed record with the reason and the tokens that came."""
    requests = outcome(handler)
    assert set(requests["status"]) == {"failed"}
    assert all(reason in text for text in requests["reason"])


def test_bad_answers_do_not_harm_the_good_ones_beside_them():
    """Every third request is reset, every third refused; the others finish."""

    async def handler(exchange: Exchange) -> None:
        kinds = (good_stream, resets, breaks_down)
        await kinds[exchange.number % 3](exchange)

    requests = outcome(handler, count=18)
    assert requests["status"].to_list() == ["finished", "failed", "failed"] * 6


def test_events_in_one_packet_share_its_time_and_all_count():
    """Four tokens and the end in one write: one stamp, gaps of zero."""

    async def handler(exchange: Exchange) -> None:
        events = b'data: {"choices":[{"text":"a"}]}\r\n\r\n' * 4 + b"data: [DONE]\r\n\r\n"
        await exchange.plain(200, events, b"Content-Type: text/event-stream")

    requests = outcome(handler)
    assert requests["output_tokens"].to_list() == [4] * 3
    assert (requests["first_token_s"] == requests["finished_s"]).all()


def test_the_servers_usage_beats_our_count():
    """A chunk can hold several tokens: usage says how many there were."""

    async def handler(exchange: Exchange) -> None:
        await exchange.raw(STREAM_HEAD + b"\r\n")
        await exchange.event({"choices": [{"text": "a b c"}]})
        details = {"cached_tokens": 1}
        usage = {"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": details}
        await exchange.event({"choices": [], "usage": usage})
        await exchange.chunk(b"data: [DONE]\n\n")
        await exchange.raw(b"0\r\n\r\n")

    requests = outcome(handler)
    row = requests.row(0, named=True)
    assert (row["input_tokens"], row["output_tokens"], row["reused_tokens"]) == (5, 3, 1)


def test_a_server_that_dies_ends_the_run_promptly():
    """Rows up to an hour away are not waited for: they fail at their own time, with the reason."""

    async def main():
        server = Server(good_stream)
        plan = a_plan([0.0, 0.1, 1.2, 1.3, 600.0, 3600.0])

        async def die() -> None:
            async with server.running():
                await asyncio.sleep(0.8)
            server.close_connections()

        life = asyncio.create_task(die(), name="server")
        await asyncio.sleep(0.05)
        began = time.perf_counter()
        _, stats, requests, _ = await send(server, plan, PATIENT, gone_after_s=0.3)
        await life
        return stats, requests, time.perf_counter() - began

    stats, requests, took_s = run(main())
    assert took_s < 30
    assert stats.gone == "connection refused"
    assert requests["status"].to_list() == ["finished"] * 2 + ["failed"] * 4
    assert requests["reason"].to_list()[2:] == [
        *["connection refused"] * 2,
        *["endpoint gone: connection refused"] * 2,
    ]
    assert (requests["finished_s"] >= requests["arrival_s"]).all()


def test_a_server_that_is_down_at_the_start_is_one_line():
    """The line names the place and the remedy."""

    async def main():
        server = Server(good_stream)
        async with server.running():
            pass
        bodies = BuildAhead(a_request, 1, 1)
        Engine(a_plan([0.0]), bodies, Address("127.0.0.1", server.port), PATIENT)

    with pytest.raises(ReplayError, match=r"nothing listens there; start the server"):
        run(main())


def test_stopping_keeps_what_was_measured():
    """Two have finished, two are under way, one is not due: 2 finished, 2 failed, 1 left out."""

    async def handler(exchange: Exchange) -> None:
        await (good_stream if exchange.number < 2 else never_answers)(exchange)

    async def main():
        async with Server(handler).running() as server:
            plan = a_plan([0.0, 0.0, 0.1, 0.1, 900.0])
            bodies = BuildAhead(a_request, 5, 1 << 20)
            bodies.start()
            engine = Engine(plan, bodies, Address("127.0.0.1", server.port), PATIENT)
            asyncio.get_running_loop().call_later(0.6, engine.stop)
            stats = await engine.run(time.perf_counter() + 0.15)
            bodies.stop()
            return stats, build_frames(plan, [engine.recorder.drain()])[0]

    stats, requests = run(main())
    assert stats.interrupted_at_s is not None
    assert requests["status"].to_list() == ["finished"] * 2 + ["failed"] * 2
    assert requests["reason"].to_list()[2:] == ["interrupted"] * 2


def test_a_large_prompt_does_not_hold_up_the_requests_beside_it():
    """8 MB that the server reads late is one connection's matter; the others finish meanwhile."""

    async def main():
        gate = asyncio.Event()

        async def handler(exchange: Exchange) -> None:
            if exchange.number == 0:
                await gate.wait()
            await good_stream(exchange)
            if exchange.number == 5:
                gate.set()

        async with Server(handler).running() as server:
            plan = a_plan([0.0, 0.05, 0.1, 0.15, 0.2, 0.25])
            bodies = BuildAhead(
                lambda row: a_request(row, size=0 if row else 8 << 20), len(plan), 1 << 20
            )
            bodies.start()
            engine = Engine(plan, bodies, Address("127.0.0.1", server.port), PATIENT)
            await engine.run(time.perf_counter() + 0.3)
            bodies.stop()
            return build_frames(plan, [engine.recorder.drain()])[0]

    requests = run(main())
    assert set(requests["status"]) == {"finished"}
    finished_s = requests["finished_s"].to_list()
    assert finished_s[0] >= max(finished_s[1:])
