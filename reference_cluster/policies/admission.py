"""Is a request refused, and why? Decided on arrival, before any work is done for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from reference_cluster.config import ConductorConfig, Slo
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


class EarlyRejection:
    """Refuse what would miss its SLO by the loads of this moment (Mooncake, Algorithm 1)."""

    is_rechecking = True

    def __init__(self, slo: Slo) -> None:
        self.slo = slo

    def admit(self, request: Request, placement: Placement, view: ClusterView) -> Rejected | None:
        if placement.ttft_s > self.slo.ttft_s:
            return Rejected("ttft", max(1.0, placement.ttft_s - self.slo.ttft_s))
        if placement.tbt_s > self.slo.tbt_s:
            return Rejected("tbt", 1.0)
        if view.decode[placement.decode].free_tokens < request.kv_tokens:
            return Rejected("capacity", 1.0)
        return None


def make_admission(config: ConductorConfig, slo: Slo) -> Admission:
    """The policy that the configuration names."""
    by_name: dict[str, Callable[[Slo], Admission]] = {
        "accept-all": AcceptAll,
        "early-rejection": EarlyRejection,
    }
    return by_name[config.admission](slo)
