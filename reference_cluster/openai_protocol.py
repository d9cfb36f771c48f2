"""What do OpenAI-style requests and answers look like, as bytes? Pure: no I/O."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import msgspec

from reference_cluster.request import Request, Sampling

TOKEN_TEXT = " the"  # What a modelled engine says, whatever it was asked.
STOPS_MAX = 4  # As OpenAI's.
STAMPS = (
    "placed_s",
    "fetched_s",
    "prefill_start_s",
    "prefill_end_s",
    "transferred_s",
    "first_token_s",
    "decode_start_s",
    "finished_s",
    "transfer_start_s",
)


class BadRequestError(ValueError):
    """What the client sent cannot be served; the message is one line for people."""


class StreamOptions(msgspec.Struct):
    include_usage: bool = False
    include_timeline: bool = False  # Ours: the request's stamps with the usage.


class Message(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None


class Body(msgspec.Struct):
    """The fields that matter here; others are accepted and ignored, as by other servers."""

    model: str | None = None
    prompt: str | list[int] | None = None
    messages: list[Message] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    temperature: float | None = None  # Greedy where it is not given.
    top_p: float | None = None
    seed: int | None = None  # One is drawn where it is not given.
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    cache_salt: str | None = None  # vLLM's: only prompts with the same salt share their blocks.


DECODER = msgspec.json.Decoder(Body)


def parse_body(data: bytes, is_chat: bool) -> Body:
    """Decode and check a request body; raises BadRequestError."""
    try:
        body = DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequestError(f"the body is not a valid request: {error}") from None
    if is_chat and not body.messages:
        raise BadRequestError("`messages` is missing or empty")
    if not is_chat and not body.prompt:
        raise BadRequestError("`prompt` is missing or empty; give a string or a list of token ids")
    if body.n != 1:
        raise BadRequestError("`n` must be 1 here")
    if asked_tokens(body) < 1:
        raise BadRequestError("`max_tokens` must be at least 1")
    check_sampling(body)
    return body


def check_sampling(body: Body) -> None:
    """Raises BadRequestError."""
    if body.temperature is not None and not 0 <= body.temperature <= 2:
        raise BadRequestError(f"`temperature` is {body.temperature:g}; use 0 (greedy) to 2")
    if body.top_p is not None and not 0 < body.top_p <= 1:
        raise BadRequestError(f"`top_p` is {body.top_p:g}; use more than 0, up to 1")
    if body.seed is not None and not -(1 << 63) <= body.seed < 1 << 63:
        raise BadRequestError("`seed` must be an integer of 64 bits")
    stops = stop_strings(body)
    if len(stops) > STOPS_MAX or not all(stops):
        raise BadRequestError(f"`stop` must be a string, or up to {STOPS_MAX}, none of them empty")


def stop_strings(body: Body) -> tuple[str, ...]:
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


def sampling_of(body: Body) -> Sampling:
    """How an engine that computes tokens is to choose them."""
    return Sampling(
        asked_tokens(body),
        body.temperature or 0.0,
        1.0 if body.top_p is None else body.top_p,
        # The whole way of the request has the same, so that a resumed answer goes on alike.
        secrets.randbits(63) if body.seed is None else body.seed,
        body.ignore_eos,
        stop_strings(body),
    )


def asked_tokens(body: Body) -> int:
    """Output tokens to produce at most; a modelled engine never stops by itself."""
    asked = body.max_completion_tokens
    if asked is None:
        asked = body.max_tokens
    return 16 if asked is None else asked


def prompt_tokens(body: Body) -> Sequence[int]:
    """Token ids of the prompt. Text has one token a whitespace-separated word (no tokenizer)."""
    if isinstance(body.prompt, list):
        if min(body.prompt) < 0 or max(body.prompt) >= 1 << 32:
            raise BadRequestError("`prompt` has a token id outside 0..2^32-1")
        return body.prompt
    words = prompt_text(body).split()
    if not words:
        raise BadRequestError("the prompt holds no word")
    return [crc32(word.encode()) for word in words]


def prompt_text(body: Body) -> str:
    """What was asked, where it is text."""
    return body.prompt if isinstance(body.prompt, str) else chat_text(body.messages or [])


def chat_text(messages: list[Message]) -> str:
    """The words of all messages; roles cost nothing, so that lengths are what the client meant."""
    parts = []
    for message in messages:
        if isinstance(message.content, str):
            parts.append(message.content)
        elif message.content is not None:
            parts.extend(str(part.get("text", "")) for part in message.content)
    return " ".join(parts)


class Cut:
    """Passes an answer on, piece by piece, up to the first stop string, which is left out.

    What may yet become one is kept back until more is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.kept = ""
        self.is_over = False

    def take(self, text: str, is_last: bool = False) -> str:
        """What can be said now that `text` has come."""
        self.kept += text
        found = [self.kept.find(stop) for stop in self.stops if stop in self.kept]
        if found or self.is_over:
            end = 0 if self.is_over else min(found)
            self.is_over = True
        else:
            end = len(self.kept) - (0 if is_last else self.undecided)
        said, self.kept = self.kept[:end], self.kept[end:]
        return said

    def all(self, texts: Sequence[str]) -> Sequence[str]:
        return [self.take(text) for text in texts] if self.stops else texts

    @property
    def undecided(self) -> int:
        """Characters at the end that begin a stop string."""
        sizes = [
            size
            for stop in self.stops
            for size in range(1, len(stop))
            if self.kept.endswith(stop[:size])
        ]
        return max(sizes, default=0)


class Answer:
    """Renders the answer to one request."""

    def __init__(self, request_id: str, model: str, is_chat: bool, body: Body) -> None:
        self.is_chat = is_chat
        self.options = body.stream_options or StreamOptions()
        kind = "chat.completion" if is_chat else "text_completion"
        self.head = {"id": request_id, "object": kind, "created": int(time.time()), "model": model}
        if is_chat and body.stream:
            self.head["object"] = "chat.completion.chunk"
        self.token_event = self.event(self.choice(None, TOKEN_TEXT))

    def choice(self, finish_reason: str | None, text: str) -> dict[str, Any]:
        if self.is_chat:
            return {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def token_events(self, texts: Sequence[str]) -> bytes:
        """One event a token."""
        if texts and texts[0] is TOKEN_TEXT:
            return self.token_event * len(texts)
        return b"".join(self.event(self.choice(None, text)) for text in texts)

    def event(self, *choices: dict[str, Any], **more: Any) -> bytes:
        content = msgspec.json.encode({**self.head, "choices": choices, **more})
        return b"data: " + content + b"\n\n"

    def first_events(self) -> bytes:
        """What comes before the first token: a chat's role."""
        if not self.is_chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        return self.event({"index": 0, "delta": delta, "finish_reason": None})

    def last_events(self, request: Request, text: str) -> bytes:
        """What comes after the last token but one."""
        events = self.event(self.choice(request.finish_reason, text))
        if self.options.include_usage:
            more: dict[str, Any] = {"usage": usage(request)}
            if self.options.include_timeline:
                more["timeline"] = timeline(request)
            events += self.event(**more)
        return events + b"data: [DONE]\n\n"

    def whole(self, request: Request, text: str) -> bytes:
        """The answer in one piece."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": request.finish_reason}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice |= {"text": text, "logprobs": None}
        answer = {**self.head, "choices": [choice], "usage": usage(request)}
        if self.options.include_timeline:
            answer["timeline"] = timeline(request)
        return msgspec.json.encode(answer)


def usage(request: Request) -> dict[str, Any]:
    return {
        "prompt_tokens": request.input_tokens,
        "completion_tokens": request.produced_tokens,
        "total_tokens": request.input_tokens + request.produced_tokens,
        "prompt_tokens_details": {"cached_tokens": request.reused_tokens},
    }


def timeline(request: Request) -> dict[str, Any]:
    """What happened when, in seconds since the server received the request."""
    begin_s = request.timeline.arrived_s
    stamps = {name: getattr(request.timeline, name) for name in STAMPS}
    relative = {
        name: None if at_s is None else round(at_s - begin_s, 9) for name, at_s in stamps.items()
    }
    return {
        **relative,
        "chunks": [
            [round(start_s - begin_s, 9), round(end_s - begin_s, 9), tokens]
            for start_s, end_s, tokens in request.timeline.chunks
        ],
        "fetched_tokens": request.fetched_tokens,
        "prefill_busy_s": request.prefill_busy_s,
        "predicted_ttft_s": request.predicted_ttft_s,
        "predicted_tbt_s": request.predicted_tbt_s,
        "prefix_replicas": request.prefix_replicas,
        "prefill": request.prefill,
        "decode": request.decode,
    }


def error_body(message: str, kind: str, code: int, reason: str | None = None) -> bytes:
    """An error as OpenAI's clients expect it, with our machine-readable reason."""
    error: dict[str, Any] = {"message": message, "type": kind, "code": code}
    if reason is not None:
        error["reason"] = reason
    return msgspec.json.encode({"error": error})
