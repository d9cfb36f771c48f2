"""How do clients talk to the live cluster? An OpenAI-compatible HTTP front."""

from __future__ import annotations

import asyncio
import bisect
import hmac
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from reference_cluster.blocks import prefix_hashes, salt_key
from reference_cluster.cluster import Cluster
from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import Profile
from reference_cluster.kvpool.published import Announcer, Publisher
from reference_cluster.kvpool.query import HashQuery, Indexed, QueryError, TokenQuery
from reference_cluster.live_metrics import LiveMetrics
from reference_cluster.openai_protocol import (
    Answer,
    BadRequestError,
    Cut,
    asked_tokens,
    error_body,
    parse_body,
)
from reference_cluster.policies.admission import Rejected
from reference_cluster.request import Request, Sink, Timeline
from reference_cluster.speech import make_speech

log = logging.getLogger(__name__)

BODY_BYTES_MAX = 16 * 1024 * 1024  # A 126k-token prompt as token ids is 0.8 MB.
IN_FLIGHT_MAX = 8192
JSON = "application/json"
Handler = Callable[[HttpRequest], Awaitable[Response]]


class TooLargeError(BadRequestError):
    """The body is over BODY_BYTES_MAX."""


class Listener(Sink):
    """The HTTP side of a request: how many tokens are there to be sent, and has it ended?"""

    def __init__(self) -> None:
        self.unsent = 0
        self.has_ended = False
        self.changed = asyncio.Event()

    def tokens(self, count: int) -> None:
        self.unsent += count
        self.changed.set()

    def ended(self, request: Request) -> None:
        self.has_ended = True
        self.changed.set()

    async def wait(self) -> int:
        """Sleep until something has happened; returns the tokens to send."""
        await self.changed.wait()
        self.changed.clear()
        unsent, self.unsent = self.unsent, 0
        return unsent


class Front:
    """The HTTP front of one cluster, which it starts and stops with the server.

    With `directory` its instances are workers, which meet the Conductor there.
    """

    def __init__(
        self,
        config: ClusterConfig,
        profile: Profile,
        token: str | None = None,
        directory: str | None = None,
    ) -> None:
        self.config = config
        self.profile = profile
        self.token = token
        self.directory = directory
        self.speech = make_speech(config)
        self.on_ready: Callable[[], object] = lambda: None
        self.ids = itertools.count()
        self.cluster: Cluster
        self.metrics: LiveMetrics
        self.indexed: Indexed
        self.publisher: Publisher | None = None

    def app(self) -> Starlette:
        routes = [
            Route("/v1/completions", self.guarded(self.completions), methods=["POST"]),
            Route("/v1/chat/completions", self.guarded(self.chat), methods=["POST"]),
            Route("/v1/models", self.guarded(self.models)),
            Route("/health", self.health),
            Route("/metrics", self.guarded(self.prometheus)),
            Route("/cluster/info", self.guarded(self.info)),
            Route("/cluster/samples", self.guarded(self.samples)),
            Route("/cluster/integrity", self.guarded(self.integrity)),
            Route("/query", self.guarded(self.query), methods=["POST"]),
            Route("/query_by_hash", self.guarded(self.query_by_hash), methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=self.lifespan)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """The cluster lives as long as the server."""
        # One step at a time: a live client gets each token when it exists.
        self.cluster = Cluster(
            self.config, self.profile, self.ended, steps_max=1, directory=self.directory
        )
        self.metrics = LiveMetrics(self.cluster, self.profile.name)
        self.open_index()
        self.started_s = self.cluster.loop.time()
        self.serving = asyncio.create_task(self.cluster.run(), name="cluster")
        self.serving.add_done_callback(self.stopped)
        tasks = [self.serving]
        if self.publisher is not None:
            tasks.append(asyncio.create_task(self.publisher.run(), name="publisher"))
        try:
            await self.cluster.house.ready()
            self.on_ready()
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self.publisher is not None:
                self.publisher.close()

    def open_index(self) -> None:
        """Let others ask what the instances hold, and follow it where that is configured."""
        index, conductor = self.cluster.index, self.config.conductor
        # Blocks on SSD count as the DRAM's above it: the Conductor knows of both as one.
        medium = "GPU" if self.cluster.colocated else "CPU"
        names = [one.name for one in self.cluster.colocated or self.cluster.prefill]
        model, tokens = self.profile.name, self.config.block_tokens
        self.indexed = Indexed(model, tokens, names, index, {medium: index})
        if conductor.publish_events is not None:
            self.publisher = Publisher(
                index,
                Announcer(names, medium.lower(), model, tokens),
                conductor.publish_events,
                conductor.replay_events,
                time.time,
            )

    def stopped(self, task: asyncio.Task[None]) -> None:
        """A crash of the cluster is told to the log and to everybody who waits for an answer."""
        if not task.cancelled() and task.exception() is not None:
            log.error("the cluster has stopped", exc_info=task.exception())
            for request in list(self.cluster.in_flight.values()):
                self.cluster.cancel(request, "the cluster has stopped")

    def guarded(self, handler: Handler) -> Handler:
        """Ask for the token, where one was set."""

        async def check(http: HttpRequest) -> Response:
            given = http.headers.get("authorization", "")
            if self.token and not hmac.compare_digest(
                given.encode(), f"Bearer {self.token}".encode()
            ):
                return error("a bearer token is needed", "authentication_error", 401)
            return await handler(http)

        return check

    # ---- serving -----------------------------------------------------------------------------

    async def completions(self, http: HttpRequest) -> Response:
        return await self.serve(http, is_chat=False)

    async def chat(self, http: HttpRequest) -> Response:
        return await self.serve(http, is_chat=True)

    async def serve(self, http: HttpRequest, is_chat: bool) -> Response:
        """Read a request, let it in, and answer when its first token (or its end) has come."""
        received_s = self.cluster.loop.time()
        try:
            body = parse_body(await read_body(http), is_chat)
            tokens, sampling = self.speech.tokens(body), self.speech.sampling(body)
            self.check_length(len(tokens), asked_tokens(body))
        except TooLargeError as mistake:
            return error(str(mistake), "invalid_request_error", 413)
        except BadRequestError as mistake:
            return error(str(mistake), "invalid_request_error", 400)
        if self.serving.done():
            return error("the cluster has stopped; see the server's log", "internal_error", 500)
        if len(self.cluster.in_flight) >= IN_FLIGHT_MAX:
            return error("too many requests in flight", "overloaded", 503, "in-flight")
        listener = Listener()
        request = Request(
            next(self.ids),
            len(tokens),
            asked_tokens(body),
            prefix_hashes(tokens, self.config.block_tokens, salt_key(body.cache_salt)),
            Timeline(received_s),
            sink=listener,
            prompt=self.speech.prompt(tokens),
            sampling=sampling,
            tenant=body.cache_salt or None,
        )
        if self.publisher is not None:
            self.publisher.learn(request.blocks)
        rejected = self.cluster.submit(request)
        if rejected is not None:
            return self.rejection(rejected)
        answer = Answer(f"cmpl-{request.id}", body.model or self.profile.name, is_chat, body)
        if body.stream:
            return await self.stream(http, request, listener, answer)
        return await self.whole(http, request, listener, answer)

    def check_length(self, input_tokens: int, output_tokens: int) -> None:
        """What no engine here could ever compute; raises BadRequestError."""
        most = self.speech.context_tokens_max
        if most is not None and input_tokens + output_tokens > most:
            raise BadRequestError(
                f"{input_tokens} prompt and {output_tokens} output tokens exceed the model's "
                f"context of {most}"
            )

    async def stream(
        self, http: HttpRequest, request: Request, listener: Listener, answer: Answer
    ) -> Response:
        """Server-sent events, one a token. Rejection is possible until the first token."""
        if not await self.wait_or_hang_up(http, request, listener):
            return Response(status_code=499)
        if request.status in ("rejected", "failed"):
            return self.refusal(request)

        async def events() -> AsyncIterator[bytes]:
            try:
                yield answer.first_events()
                sent, cut = 0, Cut(request.sampling.stop)
                while True:
                    unsent = await listener.wait()
                    # The last token comes with the finish reason: with it its request has ended.
                    ready = max(0, unsent - int(request.status == "finished"))
                    if ready:
                        texts = self.speech.texts(request.output, sent, ready)
                        yield answer.token_events(cut.all(texts))
                    sent += ready
                    if listener.has_ended:
                        break
                if request.status == "failed":
                    # No [DONE]: a stream that breaks must not look like one that ended.
                    yield b"data: " + failure(request) + b"\n\n"
                else:
                    texts = self.speech.texts(request.output, sent, 1)
                    text = cut.take("".join(texts), is_last=True)
                    yield answer.last_events(request, text)
            finally:
                self.cluster.cancel(request)

        return StreamingResponse(events(), media_type="text/event-stream")

    async def whole(
        self, http: HttpRequest, request: Request, listener: Listener, answer: Answer
    ) -> Response:
        while not listener.has_ended:
            if not await self.wait_or_hang_up(http, request, listener):
                return Response(status_code=499)
            listener.changed.clear()
        if request.status in ("rejected", "failed"):
            return self.refusal(request)
        text = "".join(self.speech.texts(request.output, 0, request.produced_tokens))
        text = Cut(request.sampling.stop).take(text, is_last=True)
        return Response(answer.whole(request, text), media_type=JSON)

    async def wait_or_hang_up(
        self, http: HttpRequest, request: Request, listener: Listener
    ) -> bool:
        """Sleep until there is news; False, and the request cancelled, if the client left."""
        gone = asyncio.create_task(client_left(http, listener), name=f"watch-{request.id}")
        try:
            await listener.changed.wait()
        finally:
            gone.cancel()
        if gone.done() and not gone.cancelled():
            self.cluster.cancel(request)
            return False
        return True

    def refusal(self, request: Request) -> Response:
        """Nothing was answered yet, and nothing will be."""
        if request.status == "failed":
            return Response(failure(request), 500, media_type=JSON)
        return self.rejection(Rejected(request.reason or "unknown", 1.0))

    def rejection(self, rejected: Rejected) -> Response:
        """429, or 400 for what could never be served here."""
        if rejected.reason == "too-large":
            message = "the prompt and its output exceed every instance's memory"
            answer = error(message, "early_rejection", 400, rejected.reason)
        else:
            message = f"rejected early: would miss its SLO or find no room ({rejected.reason})"
            answer = error(message, "early_rejection", 429, rejected.reason)
            answer.headers["Retry-After"] = str(max(1, round(rejected.retry_after_s)))
        answer.headers["x-rejection-reason"] = rejected.reason
        return answer

    def ended(self, request: Request) -> None:
        self.metrics.ended(request)

    # ---- looking at it -----------------------------------------------------------------------

    async def models(self, http: HttpRequest) -> Response:
        model = {"id": self.profile.name, "object": "model", "owned_by": "mooncake-bench"}
        return as_json({"object": "list", "data": [model]})

    async def health(self, http: HttpRequest) -> Response:
        if self.serving.done():
            return error("the cluster has stopped; see the server's log", "internal_error", 503)
        return as_json({"status": "ok"})

    async def prometheus(self, http: HttpRequest) -> Response:
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")

    async def info(self, http: HttpRequest) -> Response:
        profile = {name: getattr(self.profile, name) for name in ("name", "source", "error")}
        return as_json(
            {
                "system": self.config.system,
                "title": self.config.title,
                "config": msgspec.to_builtins(self.config),
                "profile": profile,
                "source": f"live-{self.config.engine.kind}",
                "workers": self.cluster.house.rows(),
            }
        )

    async def samples(self, http: HttpRequest) -> Response:
        """All of them, or those later than `?after=`, in seconds of the clock of `now_s`."""
        try:
            after_s = float(http.query_params.get("after", "-inf")) + self.started_s
        except ValueError:
            return error("after: seconds are a number", "invalid_request_error", 400)
        rows = self.cluster.samples.rows
        first = bisect.bisect_right(rows, after_s, key=lambda row: row[0])
        moved = [(row[0] - self.started_s, *row[1:]) for row in rows[first:]]
        return as_json({"now_s": self.cluster.loop.time() - self.started_s, "samples": moved})

    async def integrity(self, http: HttpRequest) -> Response:
        """Do all books balance? For every instance a line of what is wrong, empty if nothing is."""
        problems = await self.cluster.house.check()
        return as_json({"problems": problems, "in_flight": len(self.cluster.in_flight)})

    async def query(self, http: HttpRequest) -> Response:
        return await self.ask_index(http, TokenQuery)

    async def query_by_hash(self, http: HttpRequest) -> Response:
        return await self.ask_index(http, HashQuery)

    async def ask_index(
        self, http: HttpRequest, kind: type[TokenQuery] | type[HashQuery]
    ) -> Response:
        """Which instance holds how much of a prompt, in the open Conductor's form."""
        try:
            return as_json(self.indexed.answer(await read_body(http), kind))
        except TooLargeError as mistake:
            return error(str(mistake), "invalid_request_error", 413)
        except (BadRequestError, QueryError) as mistake:
            return error(str(mistake), "invalid_request_error", 400)


async def client_left(http: HttpRequest, listener: Listener) -> None:
    """Return when the client has closed its connection, and wake whoever waits."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    listener.changed.set()


async def read_body(http: HttpRequest) -> bytes:
    """The whole body, up to BODY_BYTES_MAX; raises BadRequestError."""
    parts, size = [], 0
    try:
        async for part in http.stream():
            size += len(part)
            if size > BODY_BYTES_MAX:
                raise TooLargeError(f"the body exceeds {BODY_BYTES_MAX} bytes")
            parts.append(part)
    except ClientDisconnect:
        raise BadRequestError("the client left before its request was complete") from None
    return b"".join(parts)


def failure(request: Request) -> bytes:
    return error_body(request.reason or "unknown", "internal_error", 500)


def as_json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type=JSON)


def error(message: str, kind: str, code: int, reason: str | None = None) -> Response:
    return Response(error_body(message, kind, code, reason), code, media_type=JSON)
