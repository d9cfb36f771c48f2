"""A small streaming server whose manners a test chooses, request by request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Handler = Callable[["Exchange"], Awaitable[None]]
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
)


@dataclass
class Exchange:
    """One request and the ways to answer it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    writer: asyncio.StreamWriter

    @property
    def number(self) -> int:
        return int(self.headers["x-request-id"])

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        await self.raw(b"%x\r\n%s\r\n" % (len(data), data))

    async def event(self, value: Any) -> None:
        await self.chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    async def plain(self, status: int, body: bytes, *headers: bytes) -> None:
        lines = b"".join(line + b"\r\n" for line in headers)
        head = b"HTTP/1.1 %d Some Words\r\nContent-Length: %d\r\n" % (status, len(body))
        await self.raw(head + lines + b"\r\n" + body)

    def hang_up(self) -> None:
        self.writer.transport.abort()


async def good_stream(exchange: Exchange, gap_s: float = 0.0) -> None:
    """As many tokens as asked, usage, [DONE]."""
    await exchange.raw(STREAM_HEAD + b"\r\n")
    asked = exchange.body["max_tokens"]
    for _ in range(asked):
        if gap_s:
            await asyncio.sleep(gap_s)
        await exchange.event({"choices": [{"index": 0, "text": " the"}]})
    details = {"cached_tokens": 0}
    usage = {"prompt_tokens": len(exchange.body["prompt"]), "completion_tokens": asked}
    await exchange.event({"choices": [], "usage": usage | {"prompt_tokens_details": details}})
    await exchange.chunk(b"data: [DONE]\n\n")
    await exchange.raw(b"0\r\n\r\n")


@dataclass
class Server:
    """Listens on a free port; `handler` answers every POST, `controls` the GETs."""

    handler: Handler
    controls: dict[str, Any] = field(default_factory=dict)
    received: list[int] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1 << 24)
        self.port = listener.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listener.close()

    def close_connections(self) -> None:
        """What the death of a process does to its connections."""
        for writer in self.writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        # Cancelled: the end of the test, which is no news.
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self._answer(head.decode(), reader, writer)
        writer.close()

    async def _answer(
        self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        first, *lines = head.strip().split("\r\n")
        method, target, _ = first.split()
        path = target.partition("?")[0]
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        exchange = Exchange(path, headers, json.loads(body) if body else {}, writer)
        if method == "POST":
            self.received.append(exchange.number)
            self.bodies.append(exchange.body)
            await self.handler(exchange)
        elif path in self.controls:
            value = self.controls[path]
            await exchange.plain(200, json.dumps(value() if callable(value) else value).encode())
        else:
            await exchange.plain(404, b"{}")


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    """The server on a loop of its own, in a thread: the replay brings its own loop."""
    loop = asyncio.new_event_loop()
    is_up = threading.Event()
    stop = asyncio.Event()

    async def main() -> None:
        async with server.running():
            is_up.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    assert is_up.wait(5)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
