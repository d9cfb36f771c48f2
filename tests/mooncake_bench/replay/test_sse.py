"""The streams of real servers, cut at every boundary, give the same tokens and endings."""

import contextlib
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_bench.replay.sse import MAX_EVENT_BYTES, SseError, SseReader

VLLM_COMPLETIONS = (
    'data: {"id":"cmpl-1","choices":[{"index":0,"text":" caf","logprobs":null,'
    '"finish_reason":null}],"usage":null}\n\n'
    'data: {"id":"cmpl-1","choices":[{"index":0,"text":"\u00e9 \u4e2d\U0001f600 \\"text\\": \\"",'
    '"finish_reason":"length"}]}\n\n'
    'data: {"id":"cmpl-1","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2,'
    '"prompt_tokens_details":{"cached_tokens":4}}}\n\ndata: [DONE]\n\n'
)
OPENAI_CHAT = (
    'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    'data: {"choices":[{"index":0,"delta":{"content":"Hello"}}]}\n\n'
    'data: {"choices":[{"index":0,"delta":{"content":"\\n"}}]}\n\n'
    'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2}}\n\n'
    "data: [DONE]\n\n"
)
REASONING = (
    ": keep-alive\n\n"
    'data: {"choices": [{"delta": {"role": "assistant", "content": null}}]}\n\n'
    'data: {"choices": [{"delta": {"reasoning_content": "Let me see"}}]}\n\n'
    ": ping\n\n"
    'data: {"choices": [{"delta": {"content": "42", "reasoning_content": null}}]}\n\n'
    "data: [DONE]\n\n"
)
SSE_IN_FULL = (
    '\ufeffid: 1\nevent: message\ndata: {"choices": [{"text":\ndata:  "two lines"}]}\nretry: 5\n\n'
    '\n\n\ndata:{"choices":[{"text":"no space"}]}\n\ndata:\n\ndata: [DONE]\n'
)
STREAMS = {
    "vllm": (VLLM_COMPLETIONS, 2),
    "openai": (OPENAI_CHAT, 2),
    "reasoning": (REASONING, 2),
    "in full": (SSE_IN_FULL, 2),
}


def read(pieces: list[bytes]) -> tuple[int, SseReader]:
    reader = SseReader()
    tokens = sum(reader.feed([piece]) for piece in pieces) + reader.close()
    return tokens, reader


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_split_at_every_byte_has_the_same_tokens(name, line_end):
    """UTF-8, JSON and line ends fall apart anywhere; the tokens and the end do not change."""
    text, tokens = STREAMS[name]
    data = text.replace("\n", line_end).encode()
    cuts = [[data[:at], data[at:]] for at in range(len(data) + 1)]
    for pieces in [*cuts, [data[at : at + 1] for at in range(len(data))]]:
        got, reader = read(pieces)
        assert (got, reader.is_done, reader.error) == (tokens, True, "")
        assert reader.usage.get("completion_tokens", 2) == 2


@given(
    st.lists(st.text(max_size=12), max_size=12),
    st.lists(st.integers(0, 4000), max_size=10),
    st.sampled_from(["\n\n", "\r\n\r\n"]),
)
def test_every_non_empty_text_is_a_token_whatever_it_says(texts, places, separator):
    """Texts full of quotes, keys and newlines are escaped by JSON: they cannot look like keys."""
    special = ['"text":"', "[DONE]", 'data: {"error":{"message":"x"}}', "\n\n", '"usage":{']
    events = [json.dumps({"choices": [{"text": text}]}) for text in [*texts, *special]]
    data = "".join(f"data: {event}{separator}" for event in [*events, "[DONE]"]).encode()
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    tokens, reader = read([data[a:b] for a, b in itertools.pairwise(edges)])
    assert tokens == sum(map(bool, [*texts, *special]))
    assert (reader.is_done, reader.error, reader.usage) == (True, "", {})


@given(st.binary(max_size=200), st.integers(0, 200))
def test_arbitrary_bytes_are_no_tokens_and_no_crash(data, place):
    """Anything but a stream of JSON objects ends in an SseError or in nothing."""
    with contextlib.suppress(SseError):
        _, reader = read([data[:place], data[place:]])
        assert not reader.usage


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        ('data: {"error":{"message":"CUDA out of memory","type":""}}', "CUDA out of memory"),
        ('data: {"error": {"message": "m", "type": "ServerError", "code": 500}}', "ServerError"),
        ('data: {"object":"error","message":"bad day"}', "bad day"),
        ('data: {"error":"as text"}', "as text"),
        ("event: error\ndata: overloaded\n", "overloaded"),
    ],
)
def test_an_error_object_after_200_is_seen(event, reason):
    """Servers report failures in the stream when the status has gone out already."""
    good = 'data: {"choices":[{"text":"a"}]}\n\n'
    tokens, reader = read([f"{good}{event}\n\n".encode()])
    assert (tokens, reader.error, reader.is_done) == (1, reason, False)


def test_the_timeline_of_our_own_cluster_is_kept():
    """Stamps come beside the usage in the last event before [DONE]."""
    event = '{"choices":[],"usage":{"completion_tokens":1},"timeline":{"placed_s":0.5}}'
    _, reader = read([f"data: {event}\n\ndata: [DONE]\n\n".encode()])
    assert reader.timeline == {"placed_s": 0.5}


def test_what_follows_done_is_ignored():
    """The stream is over at [DONE], whatever else is sent."""
    tokens, reader = read([b'data: [DONE]\n\ndata: {"choices":[{"text":"late"}]}\n\n'])
    assert (tokens, reader.is_done) == (0, True)


@pytest.mark.parametrize(
    "data", [b"data: hello\n\n", b'data: {"usage": {"a"\n\n', b"x" * (MAX_EVENT_BYTES + 1)]
)
def test_a_stream_that_is_no_json_or_has_no_end_is_an_error(data):
    """Not to be read for ever, not to be held in memory."""
    with pytest.raises(SseError):
        read([data])
