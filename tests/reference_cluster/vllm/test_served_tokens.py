"""Which tokens do vLLM servers get, and what are clients told of theirs?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reference_cluster.openai_protocol import BadRequestError, Body
from reference_cluster.speech import Served


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"vocab_size": 100}')
    return tmp_path


@pytest.fixture
def spoken(model: Path) -> Path:
    """With a tokenizer of two words."""
    tokenizer = {
        "model": {
            "type": "WordLevel",
            "vocab": {"[UNK]": 0, "hello": 1, "you": 2},
            "unk_token": "[UNK]",
        },
        "pre_tokenizer": {"type": "Whitespace"},
        "decoder": None,
        "version": "1.0",
        "added_tokens": [],
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


def test_a_model_without_tokenizer_says_numbers(model):
    """Words become ids of its vocabulary; token 17 says 17."""
    speech = Served(model, 10)
    tokens = speech.tokens(Body(prompt="some words here"))
    assert len(tokens) == 3
    assert 3 <= min(tokens) <= max(tokens) < 100
    assert speech.tokens(Body(prompt=[5, 99])) == [5, 99]
    assert speech.texts([17, 4, 5], 0, 2) == [" 17", " 4"]
    with pytest.raises(BadRequestError, match=r"outside 0\.\.99"):
        speech.tokens(Body(prompt=[100]))
    with pytest.raises(BadRequestError, match=r"tokenizer\.json"):
        speech.sampling(Body(prompt=[5], stop="x"))


def test_a_model_with_tokenizer_says_words(spoken):
    """Of a token that is not there (yet) nothing."""
    pytest.importorskip("tokenizers")
    speech = Served(spoken, 10)
    assert speech.tokens(Body(prompt="you hello")) == [2, 1]
    assert "".join(speech.texts([1, 2], 0, 2)) == "hello you"
    assert speech.texts([1, 2], 2, 1) == []
    assert speech.sampling(Body(prompt=[1], stop="x")).stop == ("x",)


def test_a_model_that_is_elsewhere_wants_token_ids(tmp_path):
    """Servers by URL may have any vocabulary."""
    speech = Served(tmp_path, 10)
    assert speech.tokens(Body(prompt=[1 << 30])) == [1 << 30]
    with pytest.raises(BadRequestError, match="give token ids"):
        speech.tokens(Body(prompt="words"))
