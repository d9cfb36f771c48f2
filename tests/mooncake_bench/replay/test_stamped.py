"""The kernel's stamps: right whatever the process does, and whole streams through them."""

import asyncio
import contextlib
import socket
import time

import pytest

from mooncake_bench.replay import stamped
from mooncake_bench.replay.connection import Connection
from mooncake_bench.replay.run import loop_factory
from mooncake_bench.replay.stamped import KernelClock

pytestmark = pytest.mark.skipif(not stamped.IS_OFFERED, reason="only Linux stamps packets")
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
TOKEN = b'data: {"choices":[{"text":" the"}]}\n\n'
DONE = b"data: [DONE]\n\n"


def run(main):
    """The coroutine on the loop that the product uses."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(main)


async def a_connection(listener: socket.socket, clock: KernelClock):
    """(the client's connection, the server's socket, a future of the verdict)."""
    await asyncio.sleep(0.05)  # By then the kernel has begun to stamp.
    verdict = asyncio.get_running_loop().create_future()
    connection = Connection(verdict.set_result, lambda connection: None)
    await stamped.connect(*listener.getsockname(), connection, clock)
    server, _ = listener.accept()
    return connection, server, verdict


def test_a_client_that_stands_still_does_not_move_the_times_of_tokens():
    """A token comes at once and one after 20 ms; the loop is blocked for 100 ms meanwhile."""

    async def main():
        clock = KernelClock()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            connection, server, verdict = await a_connection(listener, clock)
            connection.send(0, b"GET / HTTP/1.1\r\n\r\n")
            before = time.perf_counter()
            server.sendall(HEAD + TOKEN)
            after = time.perf_counter()
            time.sleep(0.1)  # noqa: ASYNC251  # the stall under test
            await asyncio.sleep(0.05)
            server.sendall(TOKEN + DONE)
            server.close()
            clock.close()
            return before, after, await verdict, clock.missing

    before, after, verdict, missing = run(main())
    if missing:
        pytest.skip("this kernel stamps no packets")
    first, last = verdict.times
    assert before - 0.001 <= first <= after + 0.01
    assert last - first >= 0.14  # By the sleeps between the two.


def test_a_body_that_the_kernel_does_not_take_at_once_arrives_whole():
    """8 MB to a server that reads late: the rest is written when there is room."""
    body = b"x" * (8 << 20)

    async def main():
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            with contextlib.closing(KernelClock()) as clock:
                connection, server, verdict = await a_connection(listener, clock)
            server.setblocking(False)
            connection.send(0, body)
            received = 0
            while received < len(body):
                received += len(await loop.sock_recv(server, 1 << 20))
            await loop.sock_sendall(server, HEAD + TOKEN + DONE)
            server.close()
            return received, await verdict

    received, verdict = run(main())
    assert received == len(body)
    assert len(verdict.times) == 1


def test_a_connection_closed_under_way_is_told_once():
    """The server hangs up before it answers: a verdict with the reason, and no second one."""

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            with contextlib.closing(KernelClock()) as clock:
                connection, server, verdict = await a_connection(listener, clock)
            connection.send(0, b"GET / HTTP/1.1\r\n\r\n")
            server.close()
            told = await verdict
            connection.close()
            await asyncio.sleep(0.01)  # A second one would raise: the future is set.
            return told, connection.is_open

    told, is_open = run(main())
    assert told.reason.endswith("before the response")
    assert not is_open


def test_without_a_stamp_the_time_is_that_of_reading():
    """Some sandboxes take the option and stamp nothing; this is counted."""
    clock = KernelClock()
    before = time.perf_counter()
    assert before <= clock.stamp([]) <= time.perf_counter()
    clock.close()
    assert clock.missing == 1
