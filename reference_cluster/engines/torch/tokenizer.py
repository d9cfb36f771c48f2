"""How does text become tokens and back? Bytes for the tiny model, `tokenizers` for real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from reference_cluster.errors import ConfigError

SPECIAL_TOKENS = 3  # Begin, end and padding.


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """One token a byte of UTF-8, after the special ones.

    A model with random weights says tokens beyond the bytes as well: they wrap around.
    """

    def encode(self, text: str) -> list[int]:
        return [SPECIAL_TOKENS + byte for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        data = bytes((id - SPECIAL_TOKENS) % 256 for id in ids if id >= SPECIAL_TOKENS)
        return data.decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json, as Hugging Face's tokenizers write it."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ConfigError(
                f"{path} needs tokenizers; pip install 'mooncake-bench[torch]'"
            ) from None
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001, the library raises bare Exception
            raise ConfigError(f"{path}: {error}; mend the file") from None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids))
        return text


def open_tokenizer(directory: Path | None) -> Tokenizer:
    """A model directory's own; bytes for weights from a seed."""
    if directory is None:
        return ByteTokenizer()
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ConfigError(f"{path} is missing; copy the model's tokenizer.json there")
    return FileTokenizer(path)


def say_number(token: int) -> str:
    """What a token of random weights says, which know no language."""
    return f" {token}"


def speaker(directory: Path | None) -> Callable[[Sequence[int]], str]:
    """How clients are told an answer's tokens: decoded, or by number where weights are random."""
    if directory is not None:
        return open_tokenizer(directory).decode
    return lambda ids: "".join(map(say_number, ids))
