"""What does the front understand, and what does it say to what it does not?"""

from __future__ import annotations

import json
from typing import Any

import pytest

from reference_cluster.openai_protocol import (
    BadRequestError,
    Cut,
    asked_tokens,
    chat_text,
    error_body,
    parse_body,
    prompt_tokens,
    sampling_of,
)
from reference_cluster.request import Sampling


def complaint(content: bytes | dict[str, Any], is_chat: bool = False) -> str:
    """What a client is told that sends this."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(BadRequestError) as caught:
        prompt_tokens(parse_body(data, is_chat))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "not a valid request"),
        (b"{", "not a valid request"),
        (b"[1, 2]", "not a valid request"),
        (b'{"prompt": "\xff"}', "not a valid request"),
        (b'{"prompt": "\\ud800"}', "not a valid request"),
        ({}, "`prompt` is missing"),
        ({"prompt": ""}, "`prompt` is missing"),
        ({"prompt": []}, "`prompt` is missing"),
        ({"prompt": " \n"}, "no word"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [-1]}, "outside"),
        ({"prompt": [1 << 32]}, "outside"),
        ({"prompt": [10**40]}, "prompt"),
        ({"prompt": "a", "n": 2}, "`n`"),
        ({"prompt": "a", "max_tokens": 0}, "`max_tokens`"),
        ({"prompt": "a", "max_tokens": -3}, "`max_tokens`"),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "temperature": -0.1}, "`temperature` is -0.1"),
        ({"prompt": "a", "temperature": 2.5}, "`temperature` is 2.5"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "`top_p` is 0"),
        ({"prompt": "a", "top_p": 1.1}, "`top_p` is 1.1"),
        ({"prompt": "a", "seed": 1 << 63}, "seed"),
        ({"prompt": "a", "seed": 0.5}, "seed"),
        ({"prompt": "a", "stop": ""}, "`stop`"),
        ({"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}, "`stop`"),
        ({"prompt": "a", "stop": [1]}, "stop"),
        ({"prompt": "a", "ignore_eos": "no"}, "ignore_eos"),
    ],
)
def test_a_bad_completion_is_explained(content: bytes | dict[str, Any], part: str) -> None:
    """One line that names the field."""
    assert part in complaint(content)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({}, "`messages`"),
        ({"messages": []}, "`messages`"),
        ({"messages": [{"role": "user", "content": ""}]}, "no word"),
        ({"messages": [{"content": "no role"}]}, "role"),
        ({"messages": "hello"}, "messages"),
        ({"prompt": "hello"}, "`messages`"),
    ],
)
def test_a_bad_chat_is_explained(content: dict[str, Any], part: str) -> None:
    """A completion's prompt is no message."""
    assert part in complaint(content, is_chat=True)


def test_a_word_is_a_token() -> None:
    """Whitespace separates them; equal words are equal tokens, different ones differ."""
    tokens = prompt_tokens(parse_body(b'{"prompt": "to be\\nor  not to be"}', False))
    assert len(tokens) == 6
    assert tokens[:2] == tokens[4:]
    assert len({*tokens}) == 4


def test_token_ids_are_taken_as_they_are() -> None:
    """From 0 to 2^32 - 1."""
    body = parse_body(b'{"prompt": [0, 7, 4294967295], "temperature": 0.5}', False)
    assert [*prompt_tokens(body)] == [0, 7, 4294967295]


def test_a_chat_is_the_words_of_its_messages() -> None:
    """Plain text, parts and nothing; roles cost no token."""
    parts = [{"type": "text", "text": "c d"}, {"type": "image_url"}]
    messages = [
        {"role": "system", "content": "a b"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "e"},
    ]
    body = parse_body(json.dumps({"messages": messages}).encode(), True)
    assert chat_text(body.messages or []).split() == ["a", "b", "c", "d", "e"]
    assert len(prompt_tokens(body)) == 5


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({}, 16),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 7}, 7),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
        ({"max_tokens": None}, 16),
    ],
)
def test_the_newer_name_of_the_limit_wins(fields: dict[str, Any], asked: int) -> None:
    """And 16 is OpenAI's own default."""
    assert asked_tokens(parse_body(json.dumps({"prompt": "a", **fields}).encode(), False)) == asked


def test_an_error_has_openais_shape_and_our_reason() -> None:
    """No reason, no key."""
    assert json.loads(error_body("m", "t", 429, "ttft")) == {
        "error": {"message": "m", "type": "t", "code": 429, "reason": "ttft"}
    }
    assert "reason" not in json.loads(error_body("m", "t", 400))["error"]


def test_what_a_client_says_of_sampling_is_taken() -> None:
    """Greedy and obeying end tokens by default; a seed of its own for each that gives none."""
    body = parse_body(b'{"prompt": "a", "max_tokens": 3, "temperature": 1, "stop": "x"}', False)
    one, other = sampling_of(body), sampling_of(body)
    assert one.seed != other.seed
    assert one == Sampling(3, 1.0, 1.0, one.seed, ignore_eos=False, stop=("x",))
    plain = sampling_of(parse_body(b'{"prompt": "a", "seed": 4, "top_p": 0.5}', False))
    assert plain == Sampling(16, 0.0, 0.5, 4)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["to", " be"], ["to", " be"]),
        (["a x", "z", "!"], ["a ", "xz", "!"]),
        (["a x", "y", "!"], ["a ", "", ""]),
        (["a q", " xy", " xy"], ["a q", " ", ""]),
        (["a x", "x", "y"], ["a ", "x", ""]),
        (["so x"], ["so x"]),
    ],
)
def test_a_stop_string_and_what_may_become_one_are_not_said(
    texts: list[str], said: list[str]
) -> None:
    """Until it is known that they are none; the last piece says what is left."""
    cut, last = Cut(("xy", "never")), len(texts) - 1
    assert [cut.take(text, at == last) for at, text in enumerate(texts)] == said
