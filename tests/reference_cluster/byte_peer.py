"""The other process of the byte transports' tests, and the transports that can be tested here.

As a program it starts a transport over a segment of its own, prints its Endpoint, and then does
what its standard input says; it ends with that.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from reference_cluster.errors import ConfigError
from reference_cluster.transports.bytes import ByteTransport, Endpoint, Range, Segment, sweep
from reference_cluster.transports.capped import CappedTransport
from reference_cluster.transports.mooncake import MooncakeTransport
from reference_cluster.transports.rdma.devices import usable_devices
from reference_cluster.transports.shm import ShmTransport
from reference_cluster.transports.tcp import TcpTransport

SIZE = 32 << 20
PREFIX = f"mcb-test{os.getpid()}-"


def capped() -> ByteTransport:
    return CappedTransport(TcpTransport(), 2e9)


def rdma_transport() -> ByteTransport:
    # Imported where it is used: it cannot be where pyverbs is missing.
    from reference_cluster.transports.rdma.transport import RdmaTransport

    return RdmaTransport()


MAKERS: dict[str, Callable[[], ByteTransport]] = {
    "shm": ShmTransport,
    "tcp": TcpTransport,
    "tcp, capped": capped,
    "mooncake": MooncakeTransport,
    "rdma": rdma_transport,
}


def why_not(kind: str) -> str | None:
    """The reason why a transport cannot be tested on this machine."""
    if kind == "rdma" and not usable_devices():
        return "no RDMA device; `make test-rdma` brings one"
    if kind == "rdma":
        try:
            import reference_cluster.transports.rdma.verbs  # noqa: F401  # only whether it can be
        except ConfigError as error:
            return str(error)
    needs = {"mooncake": "mooncake"}.get(kind)
    if needs is not None and importlib.util.find_spec(needs) is None:
        return f"{needs} is not installed"
    return None


@dataclass(frozen=True, slots=True)
class Peer:
    """The other process, where it can be reached, and its memory (seen by way of this host)."""

    process: subprocess.Popen[str]
    endpoint: Endpoint
    memory: Segment

    def ask(self, command: str, *arguments: Any) -> None:
        assert self.process.stdin is not None
        line = msgspec.json.encode([command, *arguments]).decode()
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    async def answer(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.to_thread(self.process.stdout.readline)).strip()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def pause(self) -> None:
        """Returns when it has stopped: on a busy machine that takes a while."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def other_process(kind: str, size: int = SIZE) -> Iterator[Peer]:
    command = [sys.executable, "-m", "tests.reference_cluster.byte_peer", kind, str(size), PREFIX]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, f"the {kind} peer did not start"
            endpoint = msgspec.json.decode(line, type=Endpoint)
            memory = Segment.attach(endpoint.segment)
            yield Peer(process, endpoint, memory)
            memory.close()
        finally:
            process.kill()
            process.wait()
            sweep(PREFIX)


@dataclass(frozen=True, slots=True)
class Own:
    """This process's side."""

    transport: ByteTransport
    memory: Segment
    endpoint: Endpoint


@contextlib.asynccontextmanager
async def own_side(kind: str, size: int = SIZE) -> AsyncIterator[Own]:
    memory = Segment.create(size, PREFIX)
    transport = MAKERS[kind]()
    try:
        yield Own(transport, memory, await transport.start(memory))
    finally:
        await transport.close()
        memory.close()


def between_two(kind: str, script: Callable[[Own, Peer], Awaitable[None]]) -> None:
    """Run a script between this process and another."""

    async def main() -> None:
        async with own_side(kind) as own:
            await script(own, peer)

    with other_process(kind) as peer:
        asyncio.run(asyncio.wait_for(main(), 60))


def fill(memory: Segment, seed: int) -> None:
    """Bytes that tell their place and their origin."""
    memory.buffer[:] = seed.to_bytes(1) * memory.size
    for offset in range(0, memory.size - 8, 4096):
        memory.buffer[offset : offset + 8] = (seed << 56 | offset).to_bytes(8)


def crc(memory: Segment, *ranges: Range) -> int:
    value = 0
    for one in ranges or (Range(0, memory.size),):
        value = zlib.crc32(memory.buffer[one.offset : one.offset + one.length], value)
    return value


async def serve(kind: str, size: int, prefix: str) -> None:
    memory = Segment.create(size, prefix)
    transport = MAKERS[kind]()
    endpoint = await transport.start(memory)
    fill(memory, 2)
    tell(msgspec.json.encode(endpoint).decode())
    while line := await asyncio.to_thread(sys.stdin.readline):
        command, *arguments = msgspec.json.decode(line)
        if command == "read":
            peer, length = msgspec.convert(arguments, tuple[Endpoint, int])
            whole = [Range(0, length)]
            await transport.read(peer, whole, whole, 30.0)
            tell("done")
        elif command == "block":  # A loop that serves nobody for a while.
            tell("blocked")
            signal.sigtimedwait([], arguments[0])
    await transport.close()
    memory.close()


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
