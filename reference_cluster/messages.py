"""What do the processes of a live cluster say to one another? One struct a message, no pickle.

Stamps are seconds of CLOCK_MONOTONIC, which all processes of a host (and their loops) share.
Blocks are the 64-bit keys of `blocks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

from reference_cluster.policies.scheduling import Placement
from reference_cluster.request import GREEDY, Request, Sampling, Sink, Timeline
from reference_cluster.transports.bytes import Endpoint, Range

VERSION = 6  # Of this file: whoever says hello with another one is turned away.


class Message(msgspec.Struct, tag=True, array_like=True):
    """Tagged with its class's name; the fields travel in order, without names."""


class Stamps(msgspec.Struct, array_like=True):
    """What has become of a request before its first token: Timeline and counts, as far as known."""

    fetched_s: float | None = None
    prefill_start_s: float | None = None
    prefill_end_s: float | None = None
    transferred_s: float | None = None
    first_token_s: float | None = None
    reused_tokens: int = 0
    fetched_tokens: int = 0
    prefilled_tokens: int = 0
    prefill_busy_s: float = 0.0
    output: list[int] = []  # Its tokens, where they are real.
    has_stopped: bool = False  # They end by themselves.
    transfer_start_s: float | None = None
    chunks: Sequence[tuple[float, float, int]] = ()


TIMES = (
    "fetched_s",
    "prefill_start_s",
    "prefill_end_s",
    "transferred_s",
    "first_token_s",
    "transfer_start_s",
)
OTHERS = (
    "reused_tokens",
    "fetched_tokens",
    "prefilled_tokens",
    "prefill_busy_s",
    "has_stopped",
)


# ---- a worker to the Conductor ---------------------------------------------------------------


class Hello(Message):
    """A worker has started, or the Conductor asked who it is. Its pool's contents follow."""

    version: int
    name: str
    pid: int
    address: str  # Where its peers reach it.
    endpoint: Endpoint | None  # Its memory, for peers; None: no bytes are moved.


class Beat(Message):
    """The worker lives; its load and its books, so that the mirror can be put right."""

    at_s: float
    requests: list[int]  # Known to it: waiting, running, decoding or on their way.
    used_blocks: int
    pinned_blocks: int
    lag_s_max: float  # How late its engine woke at worst.
    counts: dict[str, float] = {}  # Since the start; names with their units.
    evicted_blocks: int = 0  # Since the start, of its pool.


class BlockEvent(Message):
    """A change of a pool, in the form of the open Conductor's events (Mooncake RFC #1527)."""

    event_id: int  # Without gaps; after one the contents are asked for again.
    timestamp: float
    event_type: Literal["stored", "removed", "cleared"]
    seq_hashes: tuple[int, ...]
    medium: str = "DRAM"


class Started(Message):
    """A prefill begins; `running_end_s` is when the instance predicts to be free again."""

    id: int
    running_end_s: float
    stamps: Stamps


class Prefilled(Message):
    """A prefill has ended, or was given up."""

    id: int
    stamps: Stamps


class FirstToken(Message):
    """The prompt's KV is where it will decode, and its first token exists."""

    id: int
    stamps: Stamps


class Entered(Message):
    """A request takes part in the batch from the next span on."""

    id: int
    start_s: float


class Spanned(Message):
    """The batch has made some steps (`spans.py:Span`); `running_blocks` as ColocatedLoad's."""

    start_s: float
    steps: int
    first_gap_s: float
    growth_s: float
    end_s: float
    running_blocks: int = 0
    tokens: list[tuple[int, int]] = []  # (request, its token), where they are real.
    stopped: list[int] = []  # As a span's.


class Left(Message):
    """A request was taken out of the batch before its end."""

    id: int


class Ended(Message):
    """A request ends here other than by its last token: refused, or broken."""

    id: int
    status: Literal["rejected", "failed"]
    reason: str
    is_retried: bool = False  # Another attempt may fare better.


class Checked(Message):
    """What `check_integrity` found: one line, empty if all is well."""

    ask: int
    problem: str


class Copied(Message):
    """So many blocks of a Copy are here now."""

    ask: int
    blocks: int


# ---- the Conductor to a worker ---------------------------------------------------------------


class Who(Message):
    """The Conductor, of this process, does not know you: say hello."""

    pid: int


class Peer(msgspec.Struct, frozen=True, array_like=True):
    """Another worker, and where it is reached."""

    name: str
    pid: int
    address: str
    endpoint: Endpoint | None


class Members(Message):
    """Who is a member now. Whoever is not has gone, and all that was done with it is void."""

    peers: list[Peer]


class Work(msgspec.Struct, frozen=True, array_like=True):
    """A request, as much of it as a worker needs."""

    id: int
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    arrived_s: float
    placed_s: float
    prefill: str
    decode: str
    prompt: Sequence[int] = ()  # Where tokens are real, for whoever computes them.
    tenant: str | None = None
    said: Sequence[int] = ()
    sampling: Sampling = GREEDY


class Serve(Message):
    """A request has been placed here to be prefilled."""

    work: Work
    placement: Placement


class Cancel(Message):
    """Nobody waits for this request any more."""

    id: int


class Resend(Message):
    """Events are missing: clear, and store everything again."""


class Copy(Message):
    """Fetch these blocks from their holder and keep them while they are used: replication."""

    ask: int
    holder: str
    blocks: tuple[int, ...]


class Check(Message):
    """Look at your books, answer with Checked."""

    ask: int


# ---- worker to worker ------------------------------------------------------------------------


class Hold(Message):
    """Pin these leading blocks for me, until I let go: I am going to read them."""

    ask: int
    blocks: tuple[int, ...]
    depth: int  # How many blocks of the prompt come before the first.


class Held(Message):
    """So many blocks are pinned and in DRAM, in these ranges of my memory (none where no bytes are
    moved)."""

    ask: int
    count: int
    ranges: list[Range]
    sums: list[tuple[int, int]] = []  # Places and checksums, of what cannot be verified otherwise.


class LetGo(Message):
    """What was held for this question can go."""

    ask: int


class Prepare(Message):
    """A prefill has begun whose KV will come to you: make room."""

    ask: int
    work: Work


class Prepared(Message):
    """There is room, in these ranges of my memory, one a block."""

    ask: int
    ranges: list[Range]


class Arrived(Message):
    """All the KV of a prepared request is in your memory."""

    id: int
    stamps: Stamps
    sums: list[tuple[int, int]] = []  # As Held's.


class Abandoned(Message):
    """No more bytes will come for a prepared request: its room is yours again."""

    id: int


class Sorry(Message):
    """A question that cannot be answered, and why."""

    ask: int
    reason: str


AnyMessage: TypeAlias = (
    Hello
    | Beat
    | BlockEvent
    | Started
    | Prefilled
    | FirstToken
    | Entered
    | Spanned
    | Left
    | Ended
    | Checked
    | Copied
    | Who
    | Members
    | Serve
    | Cancel
    | Resend
    | Copy
    | Check
    | Hold
    | Held
    | LetGo
    | Prepare
    | Prepared
    | Arrived
    | Abandoned
    | Sorry
)


def stamps_of(request: Request) -> Stamps:
    """What is known of a request here, for another process."""
    return Stamps(
        **{name: getattr(request.timeline, name) for name in TIMES},
        **{name: getattr(request, name) for name in OTHERS},
        output=request.output,
        chunks=request.timeline.chunks,
    )


def stamp(request: Request, stamps: Stamps) -> None:
    """Write down what another process knows of a request; what it does not know stays."""
    for name in TIMES:
        at_s = getattr(stamps, name)
        if at_s is not None:
            setattr(request.timeline, name, at_s)
    request.timeline.chunks = stamps.chunks or request.timeline.chunks
    for name in OTHERS:
        setattr(request, name, getattr(stamps, name))


def work_of(request: Request) -> Work:
    assert request.prefill is not None
    assert request.decode is not None
    stamps = request.timeline
    return Work(
        request.id,
        request.input_tokens,
        request.output_tokens,
        tuple(request.blocks),  # type: ignore[arg-type]  # keys are integers in a live cluster
        stamps.arrived_s,
        stamps.placed_s or stamps.arrived_s,
        request.prefill,
        request.decode,
        request.prompt,
        request.tenant,
        request.said,
        request.sampling,
    )


def request_of(work: Work, sink: Sink | None = None) -> Request:
    """The worker's own copy of a request."""
    timeline = Timeline(work.arrived_s, work.placed_s)
    request = Request(work.id, work.input_tokens, work.output_tokens, work.blocks, timeline, sink)
    request.prefill, request.decode = work.prefill, work.decode
    request.prompt, request.tenant = work.prompt, work.tenant
    request.said, request.sampling = work.said, work.sampling
    return request
