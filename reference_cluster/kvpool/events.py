"""What do caches tell strangers of their blocks? The open Conductor's events, and vLLM's own.

A zmq message has three frames: topic, big-endian sequence number, msgpack [ts, [events], dp_rank].
The events are maps with the names of Mooncake's RFC #1527 (docs: Conductor, Indexer API). Ours also
carry vLLM's names for the same and no token ids, as those of `mooncake_master`. Read are both
forms, and vLLM's older events, which are arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias

import msgspec

from reference_cluster.errors import ClusterError

Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
SEQUENCE_BYTES = 8
END_OF_REPLAY = b"\xff" * SEQUENCE_BYTES  # -1: nothing more is repeated.
MEDIA = ("GPU", "CPU", "DISK")
OTHER_NAMES = {"CPU_PINNED": "CPU", "DRAM": "CPU", "STORAGE": "DISK", "SSD": "DISK"}


class EventError(ClusterError):
    """A message that is no batch of events; one line says why."""


class Event(msgspec.Struct, kw_only=True, tag_field="event_type"):
    """What every event says. Events of one backend, medium and rank have consecutive ids."""

    event_id: int | None = None
    timestamp: int | None = None  # Unix time in ms; for information only.
    model_name: str | None = None
    block_size: int | None = None  # Tokens.
    additional_salt: str | None = None
    lora_name: str | None = None
    tenant_id: str = "default"
    backend_id: str | None = None  # Who has the blocks; None: whoever the endpoint belongs to.
    medium: str | None = None
    dp_rank: int | None = None


class Stored(Event, kw_only=True, tag="stored"):
    """Consecutive blocks of a prompt are there now."""

    seq_hashes: tuple[int, ...]
    base_block_idx: int | None = None  # How many blocks of the prompt come before the first.
    parent_hash: int | None = None  # The block before the first.
    token_ids: tuple[Token, ...] | None = None
    # vLLM's: what else than tokens the hashes depend on, block by block.
    extra_keys: tuple[Any, ...] | None = None


class Removed(Event, kw_only=True, tag="removed"):
    """Blocks are no more there."""

    seq_hashes: tuple[int, ...]
    base_block_idx: int | None = None


class Cleared(Event, kw_only=True, tag="cleared"):
    """Nothing is there any more: on this medium, or (None) at all."""


AnyEvent: TypeAlias = Stored | Removed | Cleared

VLLM_KINDS = {"BlockStored": "stored", "BlockRemoved": "removed", "AllBlocksCleared": "cleared"}
OPEN_KINDS = {kind: name for name, kind in VLLM_KINDS.items()}
VLLM_NAMES = {"block_hashes": "seq_hashes", "parent_block_hash": "parent_hash"}
# The order of the fields where vLLM's events are arrays; later ones say nothing that is used here.
VLLM_ARRAYS = {
    "BlockStored": (
        "type",
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
    ),
    "BlockRemoved": ("type", "block_hashes", "medium"),
    "AllBlocksCleared": ("type",),
}


def encode(events: Sequence[AnyEvent], at_s: float) -> bytes:
    """A batch as it goes over the wire; `at_s` is Unix time."""
    return msgspec.msgpack.encode([at_s, [with_vllm_names(event) for event in events], 0])


def with_vllm_names(event: AnyEvent) -> dict[str, Any]:
    wire: dict[str, Any] = msgspec.to_builtins(event)
    wire["type"] = OPEN_KINDS[wire["event_type"]]
    for name, open_name in VLLM_NAMES.items():
        if open_name in wire:
            wire[name] = wire[open_name]
    if isinstance(event, Stored):
        wire["lora_id"] = None  # vLLM's own readers insist on it.
    return wire


def decode(payload: bytes) -> list[AnyEvent]:
    """The events of a batch in any of the three forms, without those of kinds unknown here.

    Raises EventError.
    """
    try:
        batch = msgspec.msgpack.decode(payload)
        raw = batch["events"] if isinstance(batch, dict) else batch[1]
        wires = [one if isinstance(one, dict) else from_array(one) for one in raw]
        opened = [with_open_names(wire) for wire in wires]
        known = [wire for wire in opened if wire.get("event_type") in OPEN_KINDS]
        return [msgspec.convert(wire, AnyEvent) for wire in known]
    except (msgspec.DecodeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise EventError(f"not a batch of KV events: {error}") from None


def from_array(fields: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(VLLM_ARRAYS.get(fields[0], ("type",)), fields, strict=False))


def with_open_names(wire: dict[str, Any]) -> dict[str, Any]:
    """The same event by the RFC's names; hashes given as bytes become their low 64 bits."""
    wire = {VLLM_NAMES.get(name, name): value for name, value in wire.items()}
    wire.setdefault("event_type", VLLM_KINDS.get(wire.get("type", "")))
    if "seq_hashes" in wire:
        wire["seq_hashes"] = [as_key(one) for one in wire["seq_hashes"]]
    if wire.get("parent_hash") is not None:
        wire["parent_hash"] = as_key(wire["parent_hash"])
    return wire


def as_key(block_hash: Any) -> Any:
    """vLLM's hashes are 64-bit integers or all the bytes of a SHA-256, whose end these are."""
    if isinstance(block_hash, bytes):
        return int.from_bytes(block_hash[-8:], "big")
    return block_hash


def medium_of(event: Event) -> str:
    """One of MEDIA where it has one of the usual names; vLLM's GPU blocks may have none."""
    name = (event.medium or "GPU").upper()
    return OTHER_NAMES.get(name, name)
