"""What does the Conductor know when it decides? A picture of every instance, computed at `now`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from reference_cluster.request import Request


@dataclass(slots=True)
class PrefillView:
    """An instance that can prefill, for one request. Not frozen: 8 are made for every request."""

    id: int
    queue_s: float  # Predicted seconds until it could start this request.
    reused_tokens: int  # Of this request's prompt, in its own pool by the time it would start.
    context_tokens: int  # In its decode batch and its waiting requests; 0 on a prefill instance.
    read_s: float = 0.0  # Seconds until what it has of the prompt on SSD could be in its DRAM.


@dataclass(slots=True)
class DecodeView:
    """An instance that can decode. `expected` requests are placed there and not yet decoding."""

    id: int
    name: str
    batch: int
    context_tokens: int
    expected: int
    expected_tokens: int
    free_tokens: int  # Device memory for KV that neither running nor expected requests will need.


@dataclass(slots=True)
class Holder:
    """The instance with the longest prefix of this request in its pool now."""

    id: int
    blocks: int
    tokens: int
    bytes_per_s: float  # What a new transfer from it could get of its link.
    read_s: float = 0.0  # Seconds until what it has on SSD could leave.


@dataclass(slots=True)
class ClusterView:
    """Everything that a policy may look at. `prefill[i]` and `decode[i]` are by instance id.

    In a colocated cluster both lists name the same instances and a request stays where it starts.
    """

    now_s: float
    prefill: list[PrefillView]
    decode: list[DecodeView]
    holder: Holder | None
    is_colocated: bool
    in_flight: Collection[Request] = ()  # Everything let in and not yet ended.
    decode_s: float | None = None  # Mean decode time of what has finished lately.
