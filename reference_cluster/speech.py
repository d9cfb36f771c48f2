"""Which tokens is a prompt, and what do the tokens of an answer say?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import msgspec

from reference_cluster.config import ClusterConfig
from reference_cluster.engines.torch.architecture import PRESETS, read_config
from reference_cluster.engines.torch.tokenizer import (
    SPECIAL_TOKENS,
    FileTokenizer,
    Tokenizer,
    open_tokenizer,
    say_number,
)
from reference_cluster.openai_protocol import (
    TOKEN_TEXT,
    BadRequestError,
    Body,
    prompt_text,
    sampling_of,
)
from reference_cluster.openai_protocol import prompt_tokens as words_of
from reference_cluster.request import GREEDY, Sampling


class Speech(Protocol):
    """Between text and the tokens that an engine computes with."""

    context_tokens_max: int | None

    def tokens(self, body: Body) -> Sequence[int]:
        """The prompt's; raises BadRequestError."""

    def prompt(self, tokens: Sequence[int]) -> Sequence[int]:
        """What the engine is given of them."""

    def sampling(self, body: Body) -> Sampling:
        """How the engine is to choose tokens."""

    def texts(self, output: Sequence[int], start: int, count: int) -> list[str]:
        """What `count` tokens from the `start`-th on say, one by one."""


class Unspoken:
    """A modelled engine computes no tokens: it says the same word, whatever it was asked."""

    context_tokens_max: int | None = None

    def tokens(self, body: Body) -> Sequence[int]:
        return words_of(body)

    def prompt(self, tokens: Sequence[int]) -> Sequence[int]:
        return ()

    def sampling(self, body: Body) -> Sampling:
        return GREEDY

    def texts(self, output: Sequence[int], start: int, count: int) -> list[str]:
        return [TOKEN_TEXT] * count


class Numbers:
    """Random weights know no language: any words, or ids, are folded into the vocabulary, and
    token 17 of the answer says 17."""

    def __init__(self, preset: str) -> None:
        self.vocabulary = PRESETS[preset].vocabulary
        self.context_tokens_max: int | None = PRESETS[preset].context_tokens_max

    def tokens(self, body: Body) -> Sequence[int]:
        plain = self.vocabulary - SPECIAL_TOKENS
        return [SPECIAL_TOKENS + token % plain for token in words_of(body)]

    def prompt(self, tokens: Sequence[int]) -> Sequence[int]:
        return tokens

    def sampling(self, body: Body) -> Sampling:
        return sampling_of(body)

    def texts(self, output: Sequence[int], start: int, count: int) -> list[str]:
        return [say_number(token) for token in output[start : start + count]]


class Spoken:
    """A real model with the tokenizer that lies beside it."""

    def __init__(self, directory: Path) -> None:
        config = read_config(directory)
        self.vocabulary = config.vocabulary
        self.context_tokens_max: int | None = config.context_tokens_max
        self.tokenizer: Tokenizer = open_tokenizer(directory)
        assert isinstance(self.tokenizer, FileTokenizer)

    def tokens(self, body: Body) -> Sequence[int]:
        if not isinstance(body.prompt, list):
            return self.tokenizer.encode(prompt_text(body))
        if min(body.prompt) < 0 or max(body.prompt) >= self.vocabulary:
            raise BadRequestError(f"`prompt` has a token id outside 0..{self.vocabulary - 1}")
        return body.prompt

    def prompt(self, tokens: Sequence[int]) -> Sequence[int]:
        return tokens

    def sampling(self, body: Body) -> Sampling:
        return sampling_of(body)

    def texts(self, output: Sequence[int], start: int, count: int) -> list[str]:
        return decoded(self.tokenizer, output, start, count)


class Served:
    """What vLLM servers compute with. Where `directory` has no tokenizer, token 17 says 17, and
    words become ids of the vocabulary; where it has no model, prompts are token ids."""

    def __init__(self, directory: Path, context_tokens_max: int) -> None:
        self.context_tokens_max: int | None = context_tokens_max
        self.tokenizer: Tokenizer | None = None
        self.vocabulary: int | None = None
        if (directory / "config.json").exists():
            self.vocabulary = vocabulary_of(directory / "config.json")
        if (directory / "tokenizer.json").exists():
            self.tokenizer = open_tokenizer(directory)

    def tokens(self, body: Body) -> Sequence[int]:
        if isinstance(body.prompt, list):
            if self.vocabulary and not 0 <= min(body.prompt) <= max(body.prompt) < self.vocabulary:
                last = self.vocabulary - 1
                raise BadRequestError(f"`prompt` has a token id outside 0..{last}")
            return body.prompt
        if self.tokenizer is not None:
            return self.tokenizer.encode(prompt_text(body))
        if self.vocabulary is None:
            raise BadRequestError("give token ids: engine.model names no model with a tokenizer")
        plain = self.vocabulary - SPECIAL_TOKENS
        return [SPECIAL_TOKENS + token % plain for token in words_of(body)]

    def prompt(self, tokens: Sequence[int]) -> Sequence[int]:
        return tokens

    def sampling(self, body: Body) -> Sampling:
        found = sampling_of(body)
        if found.stop and self.tokenizer is None:
            raise BadRequestError("`stop` needs a model with tokenizer.json")
        return found

    def texts(self, output: Sequence[int], start: int, count: int) -> list[str]:
        if self.tokenizer is None:
            return [say_number(token) for token in output[start : start + count]]
        return decoded(self.tokenizer, output, start, count)


def vocabulary_of(path: Path) -> int | None:
    """Of a model's config.json, where it says so."""
    content: dict[str, Any] = msgspec.json.decode(path.read_bytes())
    found: int | None = content.get("text_config", content).get("vocab_size")
    return found


def decoded(tokenizer: Tokenizer, output: Sequence[int], start: int, count: int) -> list[str]:
    """A token that is half a character says nothing until the other half has come."""
    ends = range(start, min(start + count, len(output)) + 1)
    said = [tokenizer.decode(output[:end]).removesuffix("\ufffd") for end in ends]
    return [after[len(before) :] for before, after in pairwise(said)]


def make_speech(config: ClusterConfig) -> Speech:
    engine = config.engine
    if engine.kind == "modelled":
        return Unspoken()
    if engine.kind == "vllm":
        return Served(Path(engine.model), config.vllm.max_model_len)
    if engine.model in PRESETS:
        return Numbers(engine.model)
    return Spoken(Path(engine.model))
