"""Which blocks is a prompt made of? Prefix-chained hashes: equal keys mean equal whole prefixes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from reference_cluster.request import Block


def prefix_hashes(
    token_ids: Sequence[int], block_tokens: int, parent: int | None = None
) -> tuple[int, ...]:
    """64-bit keys, one a block of `block_tokens`, the last possibly partial.

    Each key hashes its own tokens *and* the previous key (Mooncake, Algorithm 1, PrefixHash). A
    partial last block has a key of its own length, as in the Mooncake traces. `parent` is the key
    of the block that the tokens follow, or a `salt_key`; None: they begin a prompt.
    """
    data = memoryview(array("I", token_ids)).cast("B")
    stride = 4 * block_tokens
    key = b"" if parent is None else parent.to_bytes(8, "little")
    keys = []
    for start in range(0, len(data), stride):
        key = blake2b(data[start : start + stride], key=key, digest_size=8).digest()
        keys.append(int.from_bytes(key, "little"))
    return tuple(keys)


def salt_key(cache_salt: str | None) -> int | None:
    """The key before the first block of prompts that share nothing with those of other salts."""
    if not cache_salt:
        return None
    return int.from_bytes(blake2b(cache_salt.encode(), digest_size=8).digest(), "little")


def blocks_of_resumed(
    blocks: Sequence[Block], input_tokens: int, produced_tokens: int, block_tokens: int, id: int
) -> tuple[Block, ...]:
    """Keys of a prompt and the tokens produced for it, where request `id` goes on elsewhere.

    Full blocks of the prompt stay what they are. What follows is nobody else's: the keys hash the
    request's id, and how many tokens a block has.
    """
    full = input_tokens // block_tokens
    keys = list(blocks[:full])
    for start in range(full * block_tokens, input_tokens + produced_tokens, block_tokens):
        tokens = min(block_tokens, input_tokens + produced_tokens - start)
        parent = keys[-1] if keys else None
        digest = blake2b(repr((parent, id, tokens)).encode(), digest_size=8).digest()
        keys.append(int.from_bytes(digest, "little"))
    return tuple(keys)


def reusable_tokens(matched_blocks: int, input_tokens: int, block_tokens: int) -> int:
    """Tokens that need no computing; the last prompt token is always computed, to get an answer."""
    matched_tokens = matched_blocks * block_tokens
    return matched_tokens if matched_tokens < input_tokens else input_tokens - 1
