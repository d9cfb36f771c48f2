"""How does the Conductor talk to one vLLM server? HTTP, with a deadline on every wait.

Ours (`worker.py`) has a stream of events, which tells at once that it has ended; a stock API server
is asked for its health now and then. Both answer /v1/completions alike.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import msgspec

from reference_cluster.engines.vllm.feed import DECODER, Event, Hello
from reference_cluster.engines.vllm.store import Offer
from reference_cluster.request import Block
from reference_cluster.transports.bytes import Endpoint

DATA = "data: "
IDLE_S_MAX = 2.0  # A connection unused for so long is not used again: a server may close it at 5 s.
HEALTH_S_MAX = 5.0

Problem = Literal["refused", "failed", "silent", "gone"]


class ServerError(Exception):
    """No answer, or half of one; `problem` says what may help.

    refused: nothing, it is the request's own fault. failed, silent: another try. gone: another
    server.
    """

    def __init__(self, problem: Problem, message: str) -> None:
        super().__init__(message)
        self.problem = problem


class Address(msgspec.Struct, frozen=True):
    """Where a worker can be reached: in a file of its name, as soon as it serves."""

    url: str
    pid: int = 0  # 0: no process of ours.
    facts: dict[str, Any] = {}  # The connector's: `connectors.Setting`.


def address_file(directory: str, name: str) -> Path:
    return Path(directory) / f"{name}.json"


class Choice(msgspec.Struct, frozen=True):
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class CachedTokens(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens_details: CachedTokens | None = None


class Stamps(msgspec.Struct, frozen=True):
    """On the host's monotonic clock; 0: it does not tell."""

    scheduled_s: float = 0.0
    first_token_s: float = 0.0


class Chunk(msgspec.Struct, frozen=True):
    """One event of a stream, or a whole answer."""

    choices: list[Choice] = []
    usage: Usage | None = None
    timeline: Stamps = Stamps()
    kv_transfer_params: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    @property
    def cached_tokens(self) -> int:
        details = self.usage.prompt_tokens_details if self.usage else None
        return (details.cached_tokens if details else 0) or 0


class Model(msgspec.Struct, frozen=True):
    id: str


class Engine(msgspec.Struct, frozen=True):
    """What Mooncake's bootstrap server says of a data-parallel rank."""

    engine_id: str


class Models(msgspec.Struct, frozen=True):
    data: Annotated[list[Model], msgspec.Meta(min_length=1)]


CHUNK: msgspec.json.Decoder[Chunk] = msgspec.json.Decoder(Chunk)


class Server:
    """One instance's server. Also what connectors know of it (`connectors.Peer`)."""

    def __init__(self, name: str, http: httpx.AsyncClient) -> None:
        self.name = name
        self.http = http
        self.address = Address("")
        self.model = ""
        self.endpoint: Endpoint | None = None
        self.slots: dict[Block, int] = {}

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.address.facts

    def offer(self, blocks: Sequence[Block]) -> Offer | None:
        if self.endpoint is None:
            return None
        slots = [self.slots.get(block) for block in blocks]
        found = slots.index(None) if None in slots else len(slots)
        return Offer(self.endpoint, [slot for slot in slots[:found] if slot is not None])

    # ---- completions -------------------------------------------------------------------------

    async def complete(self, body: dict[str, Any], within_s: float) -> Chunk:
        """The whole answer."""
        body = {"model": self.model, **body, "return_token_ids": True}
        async with self.answering("completions", within_s):
            answer = await self.http.post(
                f"{self.address.url}/v1/completions", content=msgspec.json.encode(body)
            )
        check_status(answer.status_code, answer.content)
        return decoded(answer.content)

    async def stream(
        self, body: dict[str, Any], first_within_s: float, next_within_s: float
    ) -> AsyncGenerator[Chunk, None]:
        """Its events until [DONE]; each has so long to come."""
        body = {
            "model": self.model,
            **body,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        request = self.http.build_request(
            "POST", f"{self.address.url}/v1/completions", content=msgspec.json.encode(body)
        )
        async with self.answering("stream", first_within_s):
            answer = await self.http.send(request, stream=True)
        try:
            if answer.status_code != 200:
                async with self.answering("stream", next_within_s):
                    check_status(answer.status_code, await answer.aread())
            lines, within_s = answer.aiter_lines(), first_within_s
            while True:
                async with self.answering("stream", within_s):
                    text = await anext(lines, None)
                if text is None:
                    raise ServerError("failed", f"{self.name} broke its answer off")
                if text == "data: [DONE]":
                    return
                if text.startswith(DATA):
                    yield decoded(text[len(DATA) :].encode())
                    within_s = next_within_s
        finally:
            await answer.aclose()

    @asynccontextmanager
    async def answering(self, what: str, within_s: float) -> AsyncIterator[None]:
        """Whatever goes wrong on the way becomes a ServerError."""
        try:
            async with asyncio.timeout(within_s):
                yield
        except TimeoutError:
            raise ServerError("silent", f"{self.name}: no {what} in {within_s:g} s") from None
        except httpx.HTTPError as error:
            raise ServerError("gone", f"{self.name}: {what}: {error!r}") from None
        except msgspec.MsgspecError as error:
            raise ServerError("failed", f"{self.name}: {what}: {error}") from None

    # ---- is it there? ------------------------------------------------------------------------

    async def is_healthy(self) -> bool:
        async with self.answering("health", HEALTH_S_MAX):
            return (await self.http.get(f"{self.address.url}/health")).status_code == 200

    async def learn_model(self) -> None:
        """By what name a stock server's model is asked for."""
        async with self.answering("models", HEALTH_S_MAX):
            answer = await self.http.get(f"{self.address.url}/v1/models")
            check_status(answer.status_code, answer.content)
            self.model = msgspec.json.decode(answer.content, type=Models).data[0].id

    async def learn_engine(self) -> None:
        """By what name Mooncake knows a stock server, which is told where that can be asked."""
        bootstrap = self.address.facts.get("bootstrap")
        if bootstrap is None or "engine_id" in self.address.facts:
            return
        async with self.answering("bootstrap", HEALTH_S_MAX):
            answer = await self.http.get(f"{bootstrap}/query")
            check_status(answer.status_code, answer.content)
            ranks = msgspec.json.decode(answer.content, type=dict[str, Engine])
        if "0" not in ranks:
            raise ServerError("failed", f"{self.name}: {bootstrap} knows no engine yet")
        facts = self.address.facts | {"engine_id": ranks["0"].engine_id}
        self.address = msgspec.structs.replace(self.address, facts=facts)

    async def events(self, beat_every_s: float, dead_after_s: float) -> AsyncGenerator[Event, None]:
        """What it tells of itself, until it ends; raises ServerError. Nothing where it has none."""
        url = f"{self.address.url}/events"
        request = self.http.build_request("GET", url, params={"beat_every_s": beat_every_s})
        async with self.answering("events", dead_after_s):
            answer = await self.http.send(request, stream=True)
        try:
            if answer.status_code == 404:
                return
            check_status(answer.status_code, b"no events")
            lines = answer.aiter_lines()
            while True:
                async with self.answering("events", dead_after_s):
                    text = await anext(lines, None)
                if text is None:
                    raise ServerError("gone", f"{self.name} has ended")
                if text.startswith(DATA):
                    event = DECODER.decode(text[len(DATA) :])
                    if isinstance(event, Hello):
                        self.greet(event)
                    yield event
        finally:
            await answer.aclose()

    def greet(self, hello: Hello) -> None:
        """Raises ServerError where the address is another one's by now."""
        if self.address.pid and hello.name != self.name:
            raise ServerError("gone", f"{self.address.url} is {hello.name}, not {self.name}")
        self.model = hello.model
        told = hello.endpoint
        self.endpoint = None if told is None else msgspec.convert(told, Endpoint)
        self.slots.clear()

    async def counts(self) -> dict[str, float]:
        """After it has looked at its own books; raises ServerError. Empty if it keeps none."""
        async with self.answering("pool", HEALTH_S_MAX):
            answer = await self.http.get(f"{self.address.url}/pool")
        if answer.status_code == 404:
            return {}
        check_status(answer.status_code, answer.content)
        found: dict[str, float] = answer.json()
        return found


def decoded(data: bytes) -> Chunk:
    """Raises ServerError."""
    try:
        chunk = CHUNK.decode(data)
    except msgspec.DecodeError as error:
        raise ServerError("failed", f"an answer that cannot be read: {error}") from None
    if chunk.error is not None:
        raise ServerError("failed", str(chunk.error.get("message", chunk.error))[:200])
    return chunk


def check_status(status: int, content: bytes) -> None:
    """Raises ServerError but for 200."""
    if status != 200:
        text = content[:200].decode(errors="replace")
        raise ServerError("refused" if 400 <= status < 500 else "failed", f"HTTP {status}: {text}")


def read_address(directory: str, name: str) -> Address | None:
    """None while the worker has not said where it is, or has been lost since and not come back."""
    try:
        found = msgspec.json.decode(address_file(directory, name).read_bytes(), type=Address)
        os.kill(found.pid, 0)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return found


def make_http() -> httpx.AsyncClient:
    """One client for all servers. Deadlines are set around every wait, not here."""
    limits = httpx.Limits(
        max_connections=None, max_keepalive_connections=100, keepalive_expiry=IDLE_S_MAX
    )
    return httpx.AsyncClient(
        timeout=None,
        trust_env=False,
        limits=limits,
        headers={"content-type": "application/json"},
    )
