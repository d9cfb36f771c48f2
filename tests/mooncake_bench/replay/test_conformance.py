"""Whole answers of real servers, as bytes on a connection, cut anywhere: the same verdicts.

Each stream is written by hand after what a server sends. It is fed to a connection in two reads,
cut at every byte, in single bytes, and in any pieces that hypothesis likes.
"""

import itertools
import json
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_bench.replay.connection import Connection
from mooncake_bench.replay.recorder import FAILED, FINISHED, REJECTED, Verdict

OK = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
DONE = "data: [DONE]\n\n"


def chunked(*events: str, size: str = "{:x}", end: str = "0\r\n\r\n") -> bytes:
    """Each string a chunk, as servers send an event a chunk."""
    parts = [event.encode() for event in events]
    framed = [size.format(len(part)).encode() + b"\r\n" + part + b"\r\n" for part in parts]
    return (OK + "Transfer-Encoding: chunked\r\n\r\n").encode() + b"".join(framed) + end.encode()


def event(delta: object, key: str = "text", **more: object) -> str:
    choice = {"index": 0, key: delta, "logprobs": None, "finish_reason": None}
    value = {"id": "cmpl-1", "object": "x", "choices": [choice], **more}
    return f"data: {json.dumps(value, separators=(',', ':'), ensure_ascii=False)}\n\n"


def usage(tokens: int) -> str:
    value = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": tokens}}
    return f"data: {json.dumps(value)}\n\n"


VLLM = chunked(
    *(event(f" w{n}", created=1, usage=None) for n in range(4)), event(""), usage(4), DONE
)
SGLANG = chunked(
    event({"role": "assistant", "content": ""}, "delta"),
    *(event({"content": f"w{n}"}, "delta") for n in range(3)),
    event({"content": None, "reasoning_content": None}, "delta", usage={"completion_tokens": 3}),
    DONE,
)
TGI = chunked(  # Rust's hyper: upper-case sizes, events of one line end and a space less.
    *(event(word, "delta").replace('"delta":', '"delta":{"content":').replace(',"log', '},"log')
      .replace("data: ", "data:") for word in ("a" * 150, "\u00e9\u4e2d", '\\"quoted\\": {"')),
    DONE,
    size="{:X}",
)  # fmt: skip
REASONING = chunked(
    ": keep-alive\n\n",
    event({"role": "assistant"}, "delta"),
    event({"reasoning_content": "hm"}, "delta"),
    event({"reasoning_content": "hm", "content": None}, "delta"),
    ": ping\n\n",
    event({"content": "42"}, "delta"),
    event({"content": "!"}, "delta"),
    DONE,
)
RETURNS = chunked(
    *(event(f"w{n}").replace("\n", "\r\n") for n in range(5)), DONE.replace("\n", "\r\n")
)
TOGETHER = chunked(event("a") + event("b") + event("c"), event("d"), event("e") + usage(5) + DONE)
HALVES = chunked(event("abc")[:40], event("abc")[40:], event("d"), event("e"), event("f"), DONE)
PLAIN_BODY = event("a") + event("b") + event("\u4e2d\U0001f600") + DONE
LENGTH = (OK + f"Content-Length: {len(PLAIN_BODY.encode())}\r\n\r\n{PLAIN_BODY}").encode()
CLOSES = (OK + "Connection: close\r\n\r\n" + PLAIN_BODY).encode()
TRAILERS = chunked(event("a"), event("b"), event("c"), DONE, end="0\r\nX-Sum: 1\r\n\r\n")
LATE_ERROR = chunked(
    event("a"), event("b"), event("c"), 'data: {"error":{"message":"oom","code":500}}\n\n'
)
NO_DONE = chunked(event("a"), event("b"), event("c"), event("d"))
REFUSED = (
    b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nContent-Length: 27\r\n\r\n"
    b'{"error":{"reason":"ttft"}}'
)
BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbusy\r\n0\r\n\r\n"
)
BROKEN = b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"


@dataclass(frozen=True)
class Expected:
    status: int
    tokens: int
    reason: str = ""
    usage: int | None = None
    retry_after_s: float | None = None
    is_reused: bool = True


STREAMS = {
    "vllm": (VLLM, Expected(FINISHED, 4, usage=4)),
    "sglang": (SGLANG, Expected(FINISHED, 3, usage=3)),
    "tgi": (TGI, Expected(FINISHED, 3)),
    "reasoning": (REASONING, Expected(FINISHED, 4)),
    "carriage returns": (RETURNS, Expected(FINISHED, 5)),
    "events together": (TOGETHER, Expected(FINISHED, 5, usage=5)),
    "an event in two chunks": (HALVES, Expected(FINISHED, 4)),
    "a length": (LENGTH, Expected(FINISHED, 3)),
    "until the close": (CLOSES, Expected(FINISHED, 3, is_reused=False)),
    "trailers": (TRAILERS, Expected(FINISHED, 3)),
    "an error after 200": (
        LATE_ERROR,
        Expected(FAILED, 3, "error in the stream: oom", is_reused=False),
    ),
    "no [DONE]": (NO_DONE, Expected(FAILED, 4, "stream cut before [DONE]")),
    "refused": (REFUSED, Expected(REJECTED, 0, "ttft", retry_after_s=7.0)),
    "busy": (BUSY, Expected(REJECTED, 0, "http 503")),
    "broken": (BROKEN, Expected(FAILED, 0, "http 500")),
}


@dataclass
class Wire:
    """A transport that goes nowhere."""

    written: list[bytes] = field(default_factory=list)
    closing: bool = False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = True

    def get_extra_info(self, name: str) -> None:
        return None

    def get_write_buffer_size(self) -> int:
        return 0


def outcome(pieces: list[bytes]) -> tuple[Expected, Verdict]:
    """What a connection makes of an answer in these reads, and then of the server's close."""
    verdicts: list[Verdict] = []
    released: list[Connection] = []
    connection = Connection(verdicts.append, released.append)
    wire = Wire()
    connection.connection_made(wire)
    connection.send(0, b"POST / HTTP/1.1\r\n\r\n")
    for piece in filter(None, pieces):
        if not wire.closing:
            connection.data_received(piece)
    connection.connection_lost(None)
    (verdict,) = verdicts
    wait_s = verdict.retry_after_s
    seen = Expected(
        verdict.status,
        len(verdict.times),
        verdict.reason,
        verdict.usage.get("completion_tokens"),
        wait_s if wait_s == wait_s else None,
        bool(released),
    )
    return seen, verdict


@pytest.mark.parametrize("name", STREAMS)
def test_an_answer_cut_at_every_byte_is_read_the_same(name):
    """In one read, in two with each possible cut, and byte by byte."""
    data, expected = STREAMS[name]
    cuts = [[data[:at], data[at:]] for at in range(len(data) + 1)]
    for pieces in [*cuts, [data[at : at + 1] for at in range(len(data))]]:
        seen, verdict = outcome(pieces)
        assert seen == expected
        assert list(verdict.times) == sorted(verdict.times)


@given(st.sampled_from(sorted(STREAMS)), st.lists(st.integers(0, 5000), max_size=12))
def test_an_answer_in_any_pieces_is_read_the_same(name, places):
    """The packets of the network are not ours to choose."""
    data, expected = STREAMS[name]
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    assert outcome([data[a:b] for a, b in itertools.pairwise(edges)])[0] == expected


@given(
    st.lists(st.text(max_size=6), min_size=1, max_size=30),
    st.lists(st.integers(0, 9000), max_size=4),
    st.sampled_from(["text", "content"]),
)
def test_quick_counting_agrees_with_the_texts(texts, places, key):
    """Events that differ in their texts only are counted without looking into each: rightly."""
    if key == "content":
        events = [event({"content": text}, "delta") for text in texts]
    else:
        events = [event(text) for text in texts]
    data = chunked(*events, usage(len(texts)), DONE)
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    seen, _ = outcome([data[a:b] for a, b in itertools.pairwise(edges)])
    assert (seen.status, seen.tokens) == (FINISHED, sum(map(bool, texts)))


@given(st.sampled_from(sorted(STREAMS)), st.integers(0, 5000), st.binary(min_size=1, max_size=30))
def test_an_answer_with_garbage_in_it_still_gets_one_verdict(name, place, garbage):
    """Never an exception, never two verdicts, never none."""
    data, _ = STREAMS[name]
    place %= len(data) + 1
    outcome([data[:place], garbage, data[place:]])
