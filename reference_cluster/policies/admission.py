"""Is a request refused, and why? Decided on arrival, before any work is done for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from reference_cluster.config import ConductorConfig, Slo
from reference_cluster.cost_model import CostModel
from reference_cluster.policies.prediction import DecodeTime, predicted_tbt_s
from reference_cluster.policies.scheduling import Placement
from reference_cluster.policies.view import ClusterView
from reference_cluster.request import Request


@dataclass(frozen=True, slots=True)
class Rejected:
    """`reason` is a word for machines; `retry_after_s` guesses when to try again."""

    reason: str  # ttft | tbt | capacity
    retry_after_s: float


class Admission(Protocol):
    """Decides on a placement; `None` admits it."""

    is_rechecking: bool  # Does the decode instance check its SLO again before a request joins?

    def admit(
        self, request: Request, placement: Placement, view: ClusterView
    ) -> Rejected | None: ...


class AcceptAll:
    """Everything is served, however late."""

    is_rechecking = False

    def __init__(self, slo: Slo) -> None:
        pass

    def admit(self, request: Request, placement: Placement, view: ClusterView) -> Rejected | None:
        return None


class LoadBased:
    """The papers' baseline: prefill load on arrival, decode load only when decoding would start.

    Whatever is refused there has been prefilled for nothing.
    """

    is_rechecking = True

    def __init__(self, slo: Slo) -> None:
        self.slo = slo

    def admit(self, request: Request, placement: Placement, view: ClusterView) -> Rejected | None:
        return late_first_token(placement, self.slo)


class EarlyRejection:
    """Refuse what would miss its SLO by the loads of this moment (Mooncake, Algorithm 1)."""

    is_rechecking = True

    def __init__(self, slo: Slo) -> None:
        self.slo = slo

    def admit(self, request: Request, placement: Placement, view: ClusterView) -> Rejected | None:
        if rejected := late_first_token(placement, self.slo):
            return rejected
        if placement.tbt_s > self.slo.tbt_s:
            return Rejected("tbt", 1.0)
        return no_room(request, placement, view)


class PredictiveRejection:
    """Refuse by the decode load predicted for when the prefill will have ended.

    Early rejection looks at a decode load that is one prefill time old when it matters, and so
    swings between refusing all and none. Every decode is taken to last equally long
    (system-level prediction, Mooncake section 7.4), unless `decode_time` predicts each request's.

    How long, t_d, decides how much is refused. The mean of what has finished, which is learned, is
    right where a request queues for about as long as it decodes: over such a time as many leave as
    t_d says. Where prefills are short against decodes it promises too much: whoever is found
    decoding has outlived the short ones, and room that does come free goes to later requests with
    shorter prompts. Give `decode_s` as what 95 % of decodes stay below there.
    """

    is_rechecking = True

    def __init__(
        self,
        slo: Slo,
        cost: CostModel,
        decode_s: float | None,
        decode_time: DecodeTime | None = None,
    ) -> None:
        self.slo = slo
        self.cost = cost
        self.decode_s = decode_s
        self.decode_time = decode_time

    def admit(self, request: Request, placement: Placement, view: ClusterView) -> Rejected | None:
        if rejected := late_first_token(placement, self.slo):
            return rejected
        at_s = view.now_s + placement.ttft_s
        tbt_s = predicted_tbt_s(request, view, self.cost, at_s, self.decode_time_at(view))
        request.predicted_tbt_s = tbt_s
        if tbt_s > self.slo.tbt_s:
            return Rejected("tbt", 1.0)
        return no_room(request, placement, view)

    def decode_time_at(self, view: ClusterView) -> DecodeTime:
        if self.decode_time is not None:
            return self.decode_time
        # Until something has finished nothing is taken to end.
        uniform_s = self.decode_s or view.decode_s or float("inf")
        return lambda request: uniform_s


def late_first_token(placement: Placement, slo: Slo) -> Rejected | None:
    if placement.ttft_s > slo.ttft_s:
        return Rejected("ttft", max(1.0, placement.ttft_s - slo.ttft_s))
    return None


def no_room(request: Request, placement: Placement, view: ClusterView) -> Rejected | None:
    if view.decode[placement.decode].free_tokens < request.kv_tokens:
        return Rejected("capacity", 1.0)
    return None


def make_admission(config: ConductorConfig, slo: Slo, cost: CostModel) -> Admission:
    """The policy that the configuration names."""
    if config.admission == "predictive":
        return PredictiveRejection(slo, cost, config.decode_s)
    by_name: dict[str, Callable[[Slo], Admission]] = {
        "accept-all": AcceptAll,
        "load-based": LoadBased,
        "early-rejection": EarlyRejection,
    }
    return by_name[config.admission](slo)
