"""What does the Conductor know when it decides? A picture of every instance, computed at `now`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reference_cluster.request import Request

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
LOST_TOKENS = -(1 << 60)  # Free on an instance that cannot be used: it keeps its row.
Instances = int  # A set of instances: bit i is instance i.


@dataclass(slots=True)
class PrefillView:
    """An instance that can prefill, for one request: one row of `PrefillViews`."""

    id: int
    queue_s: float  # Predicted seconds until it could start this request; infinite: it is lost.
    reused_tokens: int  # Of this request's prompt, in its own pool by the time it would start.
    context_tokens: int  # In its decode batch and its waiting requests; 0 on a prefill instance.
    read_s: float = 0.0  # Seconds until what it has of the prompt on SSD could be in its DRAM.


@dataclass(slots=True)
class DecodeView:
    """An instance that can decode: one row of `DecodeViews`.

    `expected` requests are placed there and not yet decoding.
    """

    id: int
    name: str
    batch: int
    context_tokens: int
    expected: int
    expected_tokens: int
    free_tokens: int  # Device memory for KV that neither running nor expected requests will need.


@dataclass(slots=True)
class PrefillViews:
    """All instances that can prefill, as columns by id: a policy looks at a thousand at once."""

    queue_s: Floats
    # How many tokens each set of instances could reuse; every instance is in one of the sets.
    reused: Sequence[tuple[int, Instances]]
    context_tokens: Ints | None = None  # None: 0 everywhere.
    # Looked up one by one, as it is dear; None: nothing is on SSD.
    read_s: Callable[[int], float] | None = None

    def __len__(self) -> int:
        return len(self.queue_s)

    def __getitem__(self, id: int) -> PrefillView:
        queue_s = float(self.queue_s[id])
        context_tokens = 0 if self.context_tokens is None else int(self.context_tokens[id])
        read_s = 0.0 if self.read_s is None else self.read_s(id)
        return PrefillView(id, queue_s, self.reused_tokens(id), context_tokens, read_s)

    def __iter__(self) -> Iterator[PrefillView]:
        return (self[id] for id in range(len(self)))

    def reused_tokens(self, id: int) -> int:
        return next(tokens for tokens, instances in self.reused if instances >> id & 1)


@dataclass(slots=True)
class DecodeViews:
    """All instances that can decode, as columns by id."""

    batch: Ints
    context_tokens: Ints
    expected: Ints
    expected_tokens: Ints
    free_tokens: Ints
    prefix: str = "decode"  # Of their names.

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, id: int) -> DecodeView:
        return DecodeView(
            id,
            f"{self.prefix}-{id}",
            int(self.batch[id]),
            int(self.context_tokens[id]),
            int(self.expected[id]),
            int(self.expected_tokens[id]),
            int(self.free_tokens[id]),
        )

    def __iter__(self) -> Iterator[DecodeView]:
        return (self[id] for id in range(len(self)))


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

    In a colocated cluster both name the same instances and a request stays where it starts.
    """

    now_s: float
    prefill: PrefillViews
    decode: DecodeViews
    holder: Holder | None
    is_colocated: bool
    in_flight: Collection[Request] = ()  # Everything let in and not yet ended.
    decode_s: float | None = None  # Mean decode time of what has finished lately.


def spread(values: Sequence[tuple[float, Instances]], count: int) -> Floats:
    """A column of `count` rows from one value for each set of instances."""
    most = max(values, key=lambda one: one[1].bit_count()) if len(values) > 1 else values[0]
    column = np.full(count, most[0])
    for value, instances in values:
        if instances != most[1]:
            column[ids(instances)] = value
    return column


def ids(instances: Instances) -> list[int] | Ints:
    """The ids whose bits are set, in order."""
    if instances.bit_count() < 32:
        found = []
        while instances:
            lowest = instances & -instances
            found.append(lowest.bit_length() - 1)
            instances ^= lowest
        return found
    size = (instances.bit_length() + 7) // 8
    octets = np.frombuffer(instances.to_bytes(size, "little"), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(octets, bitorder="little"))
