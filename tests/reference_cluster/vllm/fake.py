"""A vLLM server without vLLM: as much of its HTTP as the Conductor uses, and ways to fail."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any


def next_token(sequence: Sequence[int]) -> int:
    """Of everything before, so that whoever goes on with an answer says the same."""
    return (31 * sequence[-1] + 7 * len(sequence) + sum(sequence[:5])) % 997


def answer_to(prompt: Sequence[int], tokens: int) -> list[int]:
    sequence = [*prompt]
    for _ in range(tokens):
        sequence.append(next_token(sequence))
    return sequence[len(prompt) :]


class Fake:
    """One server, on a loop in a thread. `events`: lines of /events, if it has them."""

    def __init__(self, step_s: float = 0.002, events: list[dict[str, Any]] | None = None) -> None:
        self.step_s = step_s
        self.prefill_s = 0.0
        self.events = events
        self.asked: list[dict[str, Any]] = []
        self.under_way = 0
        self.is_stuck = False
        self.says_400 = False
        self.writers: dict[asyncio.StreamWriter, None] = {}
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.port = 0
        self.revive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def on_loop(self, what: Callable[[], Awaitable[None]]) -> None:
        async def do() -> None:
            await what()

        asyncio.run_coroutine_threadsafe(do(), self.loop).result(10)

    def revive(self) -> None:
        """Listen, where it did before."""

        async def listen() -> None:
            self.server = await asyncio.start_server(self.serve, "127.0.0.1", self.port)
            self.port = self.server.sockets[0].getsockname()[1]

        self.on_loop(listen)

    def kill(self) -> None:
        """All connections break, nobody listens."""

        async def end() -> None:
            self.server.close()
            for writer in [*self.writers]:
                writer.transport.abort()

        self.on_loop(end)

    def close(self) -> None:
        self.kill()

        async def end() -> None:
            for task in asyncio.all_tasks():
                if task is not asyncio.current_task():
                    task.cancel()
            await asyncio.sleep(0.01)

        self.on_loop(end)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    # ---- HTTP --------------------------------------------------------------------------------

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers[writer] = None
        try:
            while line := await reader.readline():
                path, size = line.split()[1].decode(), 0
                while (header := await reader.readline()).strip():
                    if header.lower().startswith(b"content-length:"):
                        size = int(header.split(b":")[1])
                asked = await reader.readexactly(size)
                await self.answer(path.split("?")[0], asked, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            del self.writers[writer]
            writer.close()

    async def answer(
        self, path: str, asked: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if path == "/health":
            whole(writer, 200, b"")
        elif path == "/v1/models":
            whole(writer, 200, json.dumps({"data": [{"id": "fake"}]}).encode())
        elif path == "/events" and self.events is not None:
            begin(writer)
            told = 0
            while not reader.at_eof():
                for event in self.events[told:]:
                    say(writer, event)
                told = len(self.events)
                if not self.is_stuck:
                    say(writer, {"type": "beat", "requests": self.under_way, "counts": {}})
                await asyncio.sleep(0.02)
        elif path == "/v1/completions":
            self.under_way += 1
            try:
                await self.complete(json.loads(asked), reader, writer)
            finally:
                self.under_way -= 1
        else:
            whole(writer, 404, b"{}")
        await writer.drain()

    async def complete(
        self, asked: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.asked.append(asked)
        if self.says_400:
            whole(writer, 400, b'{"error": {"message": "not by me"}}')
            return
        await wait_unless_gone(self.prefill_s, reader)
        tokens = answer_to(asked["prompt"], asked["max_tokens"])
        usage = {"prompt_tokens_details": {"cached_tokens": 0}}
        if not asked.get("stream"):
            await self.stay_if_stuck(reader)
            choice = {"index": 0, "token_ids": tokens, "finish_reason": "length"}
            params = {"from": self.port, "first": tokens[0]}
            told = {"choices": [choice], "usage": usage, "kv_transfer_params": params}
            whole(writer, 200, json.dumps(told).encode())
            return
        begin(writer)
        for place, token in enumerate(tokens, 1):
            await wait_unless_gone(self.step_s, reader)
            await self.stay_if_stuck(reader)
            reason = "length" if place == len(tokens) else None
            say(writer, {"choices": [{"token_ids": [token], "finish_reason": reason}]})
            await writer.drain()
        say(writer, {"choices": [], "usage": usage})
        say(writer, None)

    async def stay_if_stuck(self, reader: asyncio.StreamReader) -> None:
        while self.is_stuck:
            await wait_unless_gone(0.01, reader)


async def wait_unless_gone(seconds: float, reader: asyncio.StreamReader) -> None:
    """Raises ConnectionError when the client has hung up."""
    end_s = asyncio.get_running_loop().time() + seconds
    while not reader.at_eof():
        left_s = end_s - asyncio.get_running_loop().time()
        if left_s <= 0:
            return
        await asyncio.sleep(min(left_s, 0.01))
    raise ConnectionError("the client has hung up")


def whole(writer: asyncio.StreamWriter, status: int, content: bytes) -> None:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)


def begin(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")


def say(writer: asyncio.StreamWriter, event: dict[str, Any] | None) -> None:
    """None: [DONE], and the stream's end."""
    text = b"data: " + (b"[DONE]" if event is None else json.dumps(event).encode()) + b"\n\n"
    writer.write(b"%x\r\n%s\r\n" % (len(text), text) + b"0\r\n\r\n" * (event is None))


@contextmanager
def fakes(count: int, **how: Any) -> Iterator[list[Fake]]:
    with ExitStack() as stack:
        made = [Fake(**how) for _ in range(count)]
        for one in made:
            stack.callback(one.close)
        yield made
