"""The engine in closed loop, with sessions, with retries, and over TLS."""

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import time

import numpy as np
import polars as pl
import pytest
from sse_server import Exchange, Server, good_stream

from mooncake_bench.replay.bodies import BuildAhead
from mooncake_bench.replay.client import Address, Engine, Timeouts
from mooncake_bench.replay.recorder import FINISHED, REJECTED
from mooncake_bench.replay.release import Retry
from mooncake_bench.replay.run import loop_factory
from mooncake_bench.replay.schedule import Plan


def a_plan(due_s: list[float], **more: object) -> Plan:
    count = len(due_s)
    return Plan(
        request=np.arange(count),
        due_s=np.array(due_s),
        input_tokens=np.full(count, 2),
        output_tokens=np.full(count, 3),
        hash_ids=pl.Series([[row] for row in range(count)]),
        **more,
    )


def a_request(row: int) -> bytes:
    body = b'{"prompt":[1,2],"max_tokens":3}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: %d\r\n" % row
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def send(server: Server, plan: Plan, address: Address | None = None, **settings):
    """Run an engine over the plan; the table of its records, in order of the rows."""
    bodies = BuildAhead(a_request, len(plan), 1 << 20)
    bodies.start()
    address = address or Address("127.0.0.1", server.port)
    engine = Engine(plan, bodies, address, Timeouts(connect_s=5.0), **settings)
    try:
        await engine.run(time.perf_counter() + 0.05)
    finally:
        bodies.stop()
    return np.sort(engine.recorder.drain().table(), order="request")


def run(main):
    """The coroutine on the loop that the product uses."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(main)


def test_a_closed_loop_keeps_so_many_requests_under_way():
    """Never more than three at a time, and three until the end nears; lag is our own only."""
    under_way, seen = 0, []

    async def handler(exchange: Exchange) -> None:
        nonlocal under_way
        under_way += 1
        seen.append(under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        await good_stream(exchange)

    async def main():
        # Due times are the open loop's: here they do not count.
        async with Server(handler).running() as server:
            return server, await send(server, a_plan([900.0] * 20), concurrency=3)

    server, table = run(main())
    # Connections of their own: what leaves at one instant may arrive in any order.
    assert sorted(server.received) == list(range(20))
    assert max(seen) == 3
    assert set(table["status"]) == {FINISHED}
    assert (table["sent_s"] >= table["arrival_s"]).all()
    # Each release is the end of another request, but for the first three.
    assert set(table["arrival_s"][:3]) == {0.0}
    assert (np.diff(table["arrival_s"][2:]) >= 0).all()
    assert (table["arrival_s"][3:] > 0).all()


def test_the_next_turn_of_a_session_waits_for_the_answer():
    """The second turn is released 50 ms after the first one's end, which took 100 ms."""

    async def handler(exchange: Exchange) -> None:
        if exchange.number == 0:
            await asyncio.sleep(0.1)
        await good_stream(exchange)

    async def main():
        plan = a_plan(
            [0.0, 0.0, 0.02], after=np.array([-1, 0, -1]), pause_s=np.array([0.0, 0.05, 0.0])
        )
        async with Server(handler).running() as server:
            return server, await send(server, plan)

    server, table = run(main())
    assert server.received[-1] == 1
    assert table["arrival_s"][2] == 0.02
    assert table["arrival_s"][1] >= 0.15
    wait_s = table["arrival_s"][1] - table["finished_s"][0]
    assert 0.05 <= wait_s < 0.06  # [DONE] comes a moment after the last token
    assert (table["sent_s"] >= table["arrival_s"]).all()


def test_retries_are_attempts_and_the_server_says_when():
    """Refused twice, then served: one offer, three attempts, sent once by the record."""

    async def handler(exchange: Exchange) -> None:
        if exchange.number == 0 and server.received.count(0) < 3:
            await exchange.plain(429, b"{}", b"Retry-After: 0")
        else:
            await good_stream(exchange)

    server = Server(handler)

    async def main():
        async with server.running():
            return await send(server, a_plan([0.0, 0.0]), retry=Retry())

    table = run(main())
    assert sorted(server.received) == [0, 0, 0, 1]
    assert table["attempts"].tolist() == [3, 1]
    assert table["status"].tolist() == [FINISHED, FINISHED]
    assert table["sent_s"][0] < table["first_token_s"][0]


def test_a_request_that_is_always_refused_is_rejected_in_the_end():
    """As often as said, with the last word of the server; without retries, once."""

    async def handler(exchange: Exchange) -> None:
        await exchange.plain(503, b"{}", b"Retry-After: 0")

    async def main(retry: Retry | None):
        async with Server(handler).running() as server:
            return await send(server, a_plan([0.0]), retry=retry)

    for retry, attempts in ((Retry(attempts=4), 4), (None, 1)):
        (record,) = run(main(retry))
        assert (record["status"], record["attempts"]) == (REJECTED, attempts)
        assert record["retry_after_s"] == 0.0


def test_a_stop_ends_the_wait_for_a_retry():
    """An hour away: nobody waits for it when the run is ended."""

    engines: list[Engine] = []

    async def handler(exchange: Exchange) -> None:
        await exchange.plain(429, b"{}", b"Retry-After: 3600")
        asyncio.get_running_loop().call_later(0.2, engines[0].stop)

    async def main():
        async with Server(handler).running() as server:
            bodies = BuildAhead(a_request, 1, 1 << 20)
            bodies.start()
            address = Address("127.0.0.1", server.port)
            retry = Retry(cap_s=3600.0)
            engine = Engine(a_plan([0.0]), bodies, address, Timeouts(), retry=retry)
            engines.append(engine)
            await engine.run(time.perf_counter())
            bodies.stop()
            return engine.recorder.drain()

    batch = run(main())
    assert batch.reasons == ["interrupted"]


@pytest.fixture
def certificate(tmp_path):
    """A certificate for localhost that signs itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on PATH to make a certificate with")
    files = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        [*command, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True
    )
    return files


@contextlib.asynccontextmanager
async def over_tls(server: Server, certificate):
    """The server behind TLS, on a port of its own."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    listener = await asyncio.start_server(server._serve, "127.0.0.1", 0, ssl=context)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()


def test_streams_over_tls_are_read_as_over_tcp(certificate, monkeypatch):
    """The certificate is checked against the usual store, which is told to trust this one."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))

    async def main():
        server = Server(good_stream)
        async with over_tls(server, certificate) as port:
            return await send(server, a_plan([0.0] * 5), Address("localhost", port, is_tls=True))

    table = run(main())
    assert set(table["status"]) == {FINISHED}
    assert table["received_tokens"].tolist() == [3] * 5


def test_a_certificate_that_nobody_signed_is_a_failure_with_its_reason(certificate):
    """Not trusted: each request says so, and the run ends."""

    async def main():
        server = Server(good_stream)
        async with over_tls(server, certificate) as port:
            bodies = BuildAhead(a_request, 2, 1 << 20)
            bodies.start()
            address = Address("localhost", port, is_tls=True)
            engine = Engine(a_plan([0.0, 0.0]), bodies, address, Timeouts(connect_s=5.0))
            await engine.run(time.perf_counter())
            bodies.stop()
            return engine.recorder.drain(), server

    batch, server = run(main())
    assert server.received == []
    assert all("connect failed" in reason for reason in batch.reasons)
