"""What is a request, and what has happened to it so far?"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from reference_cluster.spans import Membership

Status = Literal["waiting", "finished", "rejected", "failed"]
Block = Hashable  # A prefix hash, or a trace's id: equal ids mean equal whole prefixes.


@dataclass(slots=True)
class Timeline:
    """Seconds on the cluster's clock, None where it has not happened; none before the last."""

    arrived_s: float
    placed_s: float | None = None
    fetched_s: float | None = None  # The remote part of the prefix is here (= placed without one).
    prefill_start_s: float | None = None
    prefill_end_s: float | None = None
    transferred_s: float | None = None  # All KV is at the decode instance.
    first_token_s: float | None = None
    decode_start_s: float | None = None  # Its first decode step begins.
    finished_s: float | None = None  # Or rejected, or failed.
    # Out of that order: the first of its KV leaves for its decode instance, layer by layer while
    # the prefill goes on, or after it.
    transfer_start_s: float | None = None
    # (start_s, end_s, tokens) of every chunk of a prompt that was computed in more than one.
    chunks: Sequence[tuple[float, float, int]] = ()

    def computed(self, start_s: float, end_s: float, tokens: int) -> None:
        """A chunk of the prompt, which is not all of it."""
        self.chunks = (*self.chunks, (start_s, end_s, tokens))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a client wants its tokens; temperature 0 is greedy. `max_tokens` of a whole answer."""

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()


GREEDY = Sampling()


class Sink:
    """Who listens to a request while it is served (a live client). The default hears nothing."""

    def tokens(self, count: int) -> None:
        """`count` more output tokens exist now."""

    def ended(self, request: Request) -> None:
        """The request is finished, rejected or failed; `request.status` says which."""


@dataclass(slots=True, eq=False)
class Request:
    """One request; `blocks` are the keys of its prompt, one a block, in order."""

    id: int
    input_tokens: int
    output_tokens: int
    blocks: Sequence[Block]
    timeline: Timeline
    sink: Sink | None = None
    status: Status = "waiting"
    reason: str | None = None
    is_cancelled: bool = False
    reused_tokens: int = 0
    fetched_tokens: int = 0
    produced_tokens: int = 0
    # Token ids, where an engine computes with them: the prompt's, and those of the answer so far.
    prompt: Sequence[int] = ()
    output: list[int] = field(default_factory=list)
    said: Sequence[int] = ()  # Of a resumed answer: the tokens before `output`, in `prompt` too.
    sampling: Sampling = GREEDY
    has_stopped: bool = False  # An end token or a stop string ended it, maybe before its length.
    prefilled_tokens: int = 0  # Reused and computed so far.
    prefill_busy_s: float = 0.0
    predicted_ttft_s: float | None = None
    predicted_tbt_s: float | None = None
    # How many instances held a block of its longest known prefix, on average; None: nobody any.
    prefix_replicas: float | None = None
    prefill: str | None = None  # Name of the instance.
    decode: str | None = None
    memberships: list[Membership] = field(default_factory=list)
    # An instance can be lost with what it serves. Then the request is given up there, which
    # `is_cancelled` says to all who still have it, and an attempt of it begins elsewhere, with an
    # id of its own: `client` is the request that was submitted, and that will end.
    client: Request | None = None
    tenant: str | None = None  # Whose quota of the pool its blocks count towards.
    replacements: int = 0

    @property
    def has_ended(self) -> bool:
        return self.status != "waiting"

    @property
    def finish_reason(self) -> Literal["length", "stop"]:
        return "stop" if self.has_stopped else "length"

    @property
    def kv_tokens(self) -> int:
        """Device memory it may come to need, in tokens: reserved whole, so nothing is preempted."""
        return self.input_tokens + self.output_tokens


OnEnd = Callable[[Request], None]
