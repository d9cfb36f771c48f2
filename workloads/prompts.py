"""What does a request's prompt say? Exactly the shared prefixes of its block ids, nothing more."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from workloads.errors import TraceError
from workloads.model import blocks_of

FIRST_TOKEN = 1000
VOCABULARY = 30_000
# 30,000 ** 5 exceeds 2 ** 64, so five tokens spell any 64-bit id out in full.
SPELLED = 5

_Words = npt.NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def prompt_token_ids(
    trace_key: str, hash_ids: Sequence[int] | Sequence[str], input_tokens: int, block_tokens: int
) -> list[int]:
    """The prompt as `input_tokens` token ids in [1000, 31000).

    A block's tokens depend on `trace_key` (the trace's sha256) and its id alone: two prompts
    agree on a block if and only if they share its id. The first five tokens spell the id's 64
    bits, lowest digit first, so siblings with consecutive ids differ from the first token on and
    no two ids agree on five. Raises TraceError where the number of ids does not fit.
    """
    tokens: list[int] = _tokens(trace_key, hash_ids, input_tokens, block_tokens).tolist()
    return tokens


def prompt_text(
    trace_key: str, hash_ids: Sequence[int] | Sequence[str], input_tokens: int, block_tokens: int
) -> str:
    """The same prompt as words, one a token, between single spaces."""
    tokens = _tokens(trace_key, hash_ids, input_tokens, block_tokens)
    text: bytes = _vocabulary()[tokens - FIRST_TOKEN].tobytes()
    return text[:-1].decode("ascii")


def _tokens(
    trace_key: str, hash_ids: Sequence[int] | Sequence[str], input_tokens: int, block_tokens: int
) -> npt.NDArray[np.int64]:
    """The prompt's token ids, all blocks at once: a counter-mode hash of (key, id, position)."""
    if input_tokens < 1 or len(hash_ids) != blocks_of(input_tokens, block_tokens):
        raise TraceError(
            f"{len(hash_ids)} block ids for a prompt of {input_tokens} tokens in blocks of"
            f" {block_tokens}; give one id per block"
        )
    identity = _identities(trace_key, hash_ids)
    width = min(block_tokens, input_tokens)  # A short prompt needs no more of its only block.
    positions = np.arange(1, width + 1, dtype=np.uint64) * _GOLDEN
    # Unsigned 64-bit arithmetic wraps around: that is the hash (splitmix64).
    mixed = _mix(_mix(identity)[:, None] + positions[None, :])
    tokens = (mixed >> np.uint64(32)) * np.uint64(VOCABULARY) >> np.uint64(32)
    for place in range(min(SPELLED, width)):
        tokens[:, place] = identity // np.uint64(VOCABULARY**place) % np.uint64(VOCABULARY)
    flat = tokens.reshape(-1)[:input_tokens].astype(np.int64)
    return flat + FIRST_TOKEN


def _identities(trace_key: str, hash_ids: Sequence[int] | Sequence[str]) -> _Words:
    """One 64-bit number a block: the id shifted by the key (one to one), strings hashed first."""
    if isinstance(hash_ids[0], str):
        numbers = [_digest(str(value)) for value in hash_ids]
    else:
        numbers = [int(value) % 2**64 for value in hash_ids]
    return np.array(numbers, dtype=np.uint64) + np.uint64(_digest(trace_key))


def _digest(text: str) -> int:
    """64 bits of a text, the same in every process (unlike `hash`)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(value: _Words) -> _Words:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@lru_cache(maxsize=1)
def _vocabulary() -> npt.NDArray[np.uint8]:
    """30,000 distinct words of four letters and a space, as rows of bytes."""
    consonants = np.frombuffer(b"bcdfghjklmnpqrstvwxz", dtype=np.uint8)
    vowels = np.frombuffer(b"aeiou", dtype=np.uint8)
    number = np.arange(VOCABULARY)
    rows = np.full((VOCABULARY, 5), ord(" "), dtype=np.uint8)
    rows[:, 0] = consonants[number % 20]
    rows[:, 1] = vowels[number // 20 % 5]
    rows[:, 2] = consonants[number // 100 % 20]
    rows[:, 3] = consonants[number // 2000]
    return rows
