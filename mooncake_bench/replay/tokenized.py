"""Which text has exactly so many tokens by the target's own tokenizer?

Text is made of words that are one token each, both behind a space and at the start, so that they
do not merge at block borders. Every prompt is encoded again before it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mooncake_bench.replay.errors import ReplayError

WORDS = 4096
FEWEST_WORDS = 16
ROUNDS = 4


class TokenizedWords:
    """Words of a tokenizer; create with `load_words`."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._specials = len(tokenizer.encode("").ids)
        """Tokens that the tokenizer adds to any text: the beginning of the sequence."""
        self._words = single_token_words(tokenizer)
        if len(self._words) < FEWEST_WORDS:
            raise ReplayError(
                f"--tokenizer {name}: hardly a word of it is one token; use --prompt tokens"
            )

    def text(self, tokens: Sequence[int]) -> str:
        """Words in place of token ids, as many tokens in all. Raises ReplayError."""
        count, wanted = len(self._words), len(tokens)
        words = [self._words[token % count] for token in tokens]
        used = max(1, wanted - self._specials)
        for _ in range(ROUNDS):
            text = " ".join(words[:used])
            encoded = len(self._tokenizer.encode(text).ids)
            if encoded == wanted or wanted <= self._specials:
                return text
            words.extend(words[: max(0, wanted - encoded)])
            used = max(1, used + wanted - encoded)
        raise ReplayError(
            f"--tokenizer {self._name}: no text of exactly {wanted} tokens found (got {encoded}); "
            "use --prompt tokens"
        )


def load_words(path: str) -> TokenizedWords:
    """The words of a local tokenizer.json, or of its directory. Raises ReplayError."""
    try:
        # An extra; by name, because it need not be there for the types to be checked.
        tokenizers: Any = importlib.import_module("tokenizers")
    except ImportError:
        raise ReplayError(
            "--tokenizer needs the package tokenizers; pip install 'mooncake-bench[tokenizers]'"
        ) from None
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ReplayError(f"--tokenizer {path}: no {file.name} there; give a local tokenizer.json")
    try:
        loaded = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001  # the library raises plain Exception
        why = str(error).splitlines()[0][:120]
        raise ReplayError(f"--tokenizer {file}: no tokenizer.json ({why})") from None
    return TokenizedWords(loaded, path)


def single_token_words(tokenizer: Any) -> list[str]:
    """Up to WORDS words of letters that are one token alone and behind another, in fixed order."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    seen: dict[str, None] = {}
    for piece, _ in vocabulary:
        # Byte-level and SentencePiece vocabularies mark the space before a word.
        word = piece.lstrip("\u0120\u2581")
        if word.isascii() and word.isalpha() and 2 <= len(word) <= 12:
            seen.setdefault(word)
    candidates = list(seen)
    found: list[str] = []
    specials = len(tokenizer.encode("").ids)
    for start in range(0, len(candidates), WORDS):
        part = candidates[start : start + WORDS]
        alone = tokenizer.encode_batch(part)
        behind = tokenizer.encode_batch([f"{word} {word} {word}" for word in part])
        for word, one, three in zip(part, alone, behind, strict=True):
            if len(one.ids) == 1 + specials and len(three.ids) == 3 + specials:
                found.append(word)
        if len(found) >= WORDS:
            break
    return found[:WORDS]
