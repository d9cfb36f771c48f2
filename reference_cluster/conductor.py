"""Where does a request go, and is it let in? The only caller of scheduling and admission."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from reference_cluster.blocks import reusable_tokens
from reference_cluster.cost_model import CostModel
from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.policies.admission import Admission, Rejected
from reference_cluster.policies.scheduling import Placement, Scheduling
from reference_cluster.policies.view import ClusterView, DecodeView, Holder, PrefillView
from reference_cluster.reports import LoadReports
from reference_cluster.request import Request
from reference_cluster.transports.base import Links

FORGETTING = 0.02  # Share of the newest in the learned mean decode time.


class Prefilling(Protocol):
    """What the Conductor asks of an instance that can prefill."""

    id: int

    def view(self, request: Request, held_blocks: int, now_s: float) -> PrefillView: ...


class Decoding(Protocol):
    """What the Conductor asks of an instance that can decode."""

    def decode_view(self, now_s: float) -> DecodeView: ...


class Conductor:
    """Looks at all instances, lets the policies decide, and writes down what they predicted."""

    def __init__(
        self,
        cost: CostModel,
        scheduling: Scheduling,
        admission: Admission,
        prefill: Sequence[Prefilling],
        decode: Sequence[Decoding],
        index: PrefixIndex,
        transport: Links | None,
        block_tokens: int,
        capacity_tokens: int,
        reports: LoadReports | None = None,
    ) -> None:
        self.cost = cost
        self.scheduling = scheduling
        self.admission = admission
        self.prefill = prefill
        self.decode = decode
        self.index = index
        self.transport = transport
        self.block_tokens = block_tokens
        self.capacity_tokens = capacity_tokens
        self.reports = reports  # None: every load is known as it is now.
        self.decode_s: float | None = None

    def decide(
        self, request: Request, in_flight: Collection[Request], now_s: float
    ) -> Placement | Rejected:
        """Place the request, unless it cannot or should not be served."""
        if request.kv_tokens > self.capacity_tokens:
            return Rejected("too-large", 0.0)
        view = self.view(request, in_flight, now_s)
        placement = self.scheduling.place(request, view)
        request.predicted_ttft_s, request.predicted_tbt_s = placement.ttft_s, placement.tbt_s
        rejected = self.admission.admit(request, placement, view)
        if self.reports is not None and not rejected:
            self.reports.placed(request, placement)
        return rejected or placement

    def view(self, request: Request, in_flight: Collection[Request], now_s: float) -> ClusterView:
        """Everything a policy may see: at `now_s`, but for loads that were reported before."""
        held = self.index.match(request.blocks)
        prefill = [one.view(request, held[one.id], now_s) for one in self.prefill]
        if self.reports is None:
            decode = [one.decode_view(now_s) for one in self.decode]
        else:
            decode = self.reports.put_in(prefill)
        holder = self.best_holder(request, held)
        if holder is not None:
            holder.read_s = prefill[holder.id].read_s
        is_colocated = self.transport is None
        return ClusterView(now_s, prefill, decode, holder, is_colocated, in_flight, self.decode_s)

    def learn(self, request: Request) -> None:
        """A request has finished: how long do decodes last? (A mean that forgets slowly.)"""
        stamps = request.timeline
        if request.output_tokens > 1 and stamps.finished_s and stamps.first_token_s:
            decode_s = stamps.finished_s - stamps.first_token_s
            before_s = decode_s if self.decode_s is None else self.decode_s
            self.decode_s = before_s + FORGETTING * (decode_s - before_s)

    def best_holder(self, request: Request, held: list[int]) -> Holder | None:
        """FindBestPrefixMatch; of equals, whoever can send fastest. None if nobody could gain."""
        best = max(held)
        if self.transport is None or best == min(held):
            return None
        speeds = [
            (self.transport.available_bytes_per_s(id), -id)
            for id, blocks in enumerate(held)
            if blocks == best
        ]
        bytes_per_s, negative_id = max(speeds)
        tokens = reusable_tokens(best, request.input_tokens, self.block_tokens)
        return Holder(-negative_id, best, tokens, bytes_per_s)
