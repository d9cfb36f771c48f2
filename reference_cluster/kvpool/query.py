"""Who has how much of a prompt, asked the open Conductor's way? Pure: a question and an index.

The form is that of Mooncake's Conductor (docs: Indexer API, POST /query and /query_by_hash). Of
token ids our own keys are made (`blocks.py:prefix_hashes`), not the XXH3 that it recommends; hashes
are taken as given, so that they must be those of whoever stored the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from reference_cluster.blocks import prefix_hashes, salt_key
from reference_cluster.errors import ClusterError
from reference_cluster.kvpool.events import MEDIA, Token
from reference_cluster.kvpool.index import PrefixIndex

Answer = dict[str, dict[str, dict[str, Any]]]  # By tenant and instance.


class QueryError(ClusterError):
    """A question that cannot be answered, and how to mend it."""


class Query(msgspec.Struct, kw_only=True):
    """What both kinds of question say; other fields are ignored."""

    model: str
    block_size: int
    tenant_id: str = "default"
    instance_id: str | None = None
    lora_name: str | None = None
    cache_salt: str | None = None


class TokenQuery(Query, kw_only=True):
    token_ids: list[Token]

    @property
    def blocks(self) -> tuple[int, ...]:
        full = len(self.token_ids) // self.block_size * self.block_size
        salt = salt_key(self.cache_salt)
        return prefix_hashes(self.token_ids[:full], self.block_size, salt)


class HashQuery(Query, kw_only=True):
    seq_hashes: tuple[int, ...] | None = None
    block_hash: tuple[int, ...] | None = None  # What earlier drafts call them.

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.seq_hashes or self.block_hash or ()


class Indexed(msgspec.Struct, frozen=True):
    """What can be asked about: one model's blocks, and who holds them where."""

    model: str
    block_tokens: int
    names: Sequence[str]
    index: PrefixIndex  # On any medium.
    media: Mapping[str, PrefixIndex]

    def answer(self, body: bytes, kind: type[TokenQuery] | type[HashQuery]) -> Answer:
        """Matched tokens of every instance, or of the one asked for; raises QueryError.

        Another tenant or model has no instances here, an adapter no blocks. Hashes given are
        taken to be salted already.
        """
        try:
            query = msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise QueryError(f"the body is not a valid query: {error}") from None
        if query.block_size != self.block_tokens:
            raise QueryError(f"`block_size` must be {self.block_tokens} here")
        if query.tenant_id != "default" or query.model != self.model:
            return {query.tenant_id: {}}
        blocks = () if query.lora_name else query.blocks
        found = self.matches(blocks)
        if query.instance_id is not None:
            found = {name: found[name] for name in found if name == query.instance_id}
        return {query.tenant_id: found}

    def matches(self, blocks: Sequence[int]) -> dict[str, dict[str, Any]]:
        """Tokens by instance: the longest prefix in all, and on each medium alone."""
        nothing = [0] * len(self.names)
        longest = self.index.match(blocks)
        by_medium = {name: index.match(blocks) for name, index in self.media.items()}
        found = {}
        for id, name in enumerate(self.names):
            tokens = longest[id] * self.block_tokens
            held = {
                medium: by_medium.get(medium, nothing)[id] * self.block_tokens
                for medium in dict.fromkeys((*MEDIA, *by_medium))
            }
            found[name] = {"longest_matched": tokens, **held, "DP": {"0": tokens}}
        return found
