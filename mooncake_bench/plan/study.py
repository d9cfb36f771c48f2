"""From a spec to a report: search at every growth, verify, and look around the plan."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from mooncake_bench.plan import interval
from mooncake_bench.plan.bottleneck import WORDS, bottleneck
from mooncake_bench.plan.bound import Bound, Demand
from mooncake_bench.plan.candidate import Candidate, Load
from mooncake_bench.plan.errors import PlanError
from mooncake_bench.plan.interval import Estimate
from mooncake_bench.plan.lab import Lab, at
from mooncake_bench.plan.outcome import Outcome
from mooncake_bench.plan.result import Choice, GrowthPlan, Offer, WithError
from mooncake_bench.plan.search import COLOCATED_FACTOR, Hunt, Tried
from mooncake_bench.plan.spec import Machine, Spec, errors_of, profile_of
from mooncake_bench.slo import percent, seconds

CAPACITY_SEEDS = 2
ERROR_PRECISION = 1.06  # Of capacities with the profile's error, which is larger.
REPAIRS = 6  # Nodes added at most to a split that does not hold over the other seeds.


class Study:
    """One plan under way."""

    def __init__(self, lab: Lab, spec: Spec, demands: dict[float, Demand]) -> None:
        self.lab = lab
        self.spec = spec
        self.demands = demands  # By how many times the users.

    def load(self, growth: float) -> Load:
        """The trace at a growth: more users, or the same requests in less time."""
        if self.spec.growth_by == "users":
            return Load(users=growth, seed=self.spec.seed)
        return Load(speed=growth, seed=self.spec.seed)

    def rate_rps(self, growth: float) -> float:
        load = self.load(growth)
        demand = self.demands[load.users]
        return len(demand.input) / demand.last_s * load.speed if demand.last_s else 0.0

    def hunt(
        self, machine: Machine, growth: float, scales: tuple[float, float] = (1.0, 1.0)
    ) -> Hunt:
        load = self.load(growth)
        bound = self.demands[load.users].bound(load, profile_of(machine), self.spec.slo)
        return Hunt(self.lab, self.spec, machine, load, bound, scales)

    def check_reachable(self) -> None:
        """Raise PlanError where even idle nodes with a perfect cache would break the promise."""
        slo = self.spec.slo
        bounds = [self.hunt(machine, self.spec.growth[0]).bound for machine in self.spec.profiles]
        best = max(bounds, key=lambda bound: bound.reachable)
        if best.reachable >= slo.target:
            return
        shares = {
            f"a first token within {seconds(slo.ttft_s)}": best.within_ttft,
            f"tokens within {seconds(slo.tbt_s)}": best.within_tbt,
            "room in a node's device memory": best.fits_memory,
        }
        what, share = min(shares.items(), key=lambda one: one[1])
        raise PlanError(
            f"slo: even an idle node with a perfect cache gives only {percent(share)} of requests "
            f"{what}, and the target is {percent(slo.target)}; loosen it or add a faster profile"
        )

    # ---- one growth ----------------------------------------------------------------------------

    async def growth(self, growth: float) -> GrowthPlan:
        """The cheapest cluster that holds, verified, with its capacity and its uncertainty."""
        found = await asyncio.gather(
            *(self.offer(machine, growth) for machine in self.spec.profiles)
        )
        offers = tuple(offer for offer, _, _ in found)
        rivals = [
            (hunt.price(one), place, one, hunt, tried)
            for place, (offer, hunt, tried) in enumerate(found)
            for one in (offer.disaggregated, offer.colocated)
            if one is not None
        ]
        rate_rps = self.rate_rps(growth)
        rivals.sort(key=lambda rival: rival[:2])
        dropped: list[str] = []
        for _, place, candidate, hunt, tried in rivals:
            choice = await self.verified(hunt, candidate, dropped)
            if choice is not None:
                rest = await self.around(hunt, choice, rate_rps)
                baseline = await self.baselines(hunt, choice, offers[place])
                return GrowthPlan(
                    growth, rate_rps, offers, choice,
                    dropped=tuple(dropped), tried=tuple(tried), **baseline, **rest,
                )  # fmt: skip  # one field a line hides what is built
        said = "; ".join(f"{offer.profile}: {offer.binding}" for offer in offers if offer.binding)
        why = said or f"no more than {self.spec.limits.nodes} nodes are allowed"
        return GrowthPlan(growth, rate_rps, offers, None, infeasible=why, dropped=tuple(dropped))

    async def offer(self, machine: Machine, growth: float) -> tuple[Offer, Hunt, list[Tried]]:
        """The cheapest disaggregated and colocated cluster of one machine."""
        hunt = self.hunt(machine, growth)
        limit = self.spec.limits.nodes
        tried: list[Tried] = []
        if hunt.bound.reachable < self.spec.slo.target:
            share = percent(hunt.bound.reachable)
            why = f"even idle, a node keeps the promise to no more than {share} of requests"
            return Offer(machine.profile, hunt.bound, None, None, None, None, 0, why), hunt, tried
        best = await hunt.best_split(hunt.base())
        if best is not None:
            best, made = await hunt.with_settings(best)
            tried = list(made)
        most = min(limit, COLOCATED_FACTOR * best.nodes if best else limit)
        together = await hunt.best_colocated(most)
        binding = "" if best or together else await self.binding(hunt)
        offer = Offer(
            machine.profile,
            hunt.bound,
            best,
            None if best is None else hunt.price(best),
            together,
            None if together is None else hunt.price(together),
            most,
            binding,
        )
        return offer, hunt, tried

    async def binding(self, hunt: Hunt) -> str:
        """Which limit stands in the way: the nodes, and what they lack."""
        limit, bound = self.spec.limits.nodes, hunt.bound
        if bound.nodes > limit:
            return (
                f"limits.nodes is {limit}, and even a perfect system needs {bound.nodes} "
                f"({bound.prefill_nodes:.1f} to prefill, {bound.decode_nodes:.1f} to decode)"
            )
        decode = min(limit - 1, max(1, round(limit * share_of_decode(bound))))
        largest = hunt.base().with_split(limit - decode, decode)
        outcome = await hunt.outcome(largest, is_whole=True)
        lacking = WORDS[bottleneck(outcome, "disaggregated")]
        return (
            f"limits.nodes is {limit}: with all of them, {largest.split}, "
            f"{percent(outcome.attainment)} keep the promise; what gives out first is {lacking}"
        )

    # ---- how sure ------------------------------------------------------------------------------

    async def verified(self, hunt: Hunt, candidate: Candidate, dropped: list[str]) -> Choice | None:
        """The candidate, or one with a few nodes more, that holds over the other seeds too."""
        for _ in range(REPAIRS):
            choice = await self.choice(hunt, candidate, self.spec.verify_seeds)
            if choice.attainment.value >= self.spec.slo.target:
                return choice
            dropped.append(f"{choice.title}: {percent(choice.attainment.value)}")
            candidate = repaired(candidate, choice.outcome)
            if candidate.nodes > self.spec.limits.nodes:
                break
        return None

    async def choice(self, hunt: Hunt, candidate: Candidate, other_seeds: int) -> Choice:
        """The candidate under the load of the plan's seed and of so many others, whole."""
        first = self.spec.seed
        loads = [
            msgspec.structs.replace(hunt.load, seed=first + place)
            for place in range(other_seeds + 1)
        ]
        trials = [hunt.trial(candidate, load) for load in loads]
        outcomes = await self.lab.outcomes(trials)
        price = hunt.price(candidate)
        gpus = candidate.nodes * hunt.machine.gpus_per_node
        goodput = outcomes[0].goodput_rps
        return Choice(
            candidate,
            candidate.title,
            candidate.nodes,
            gpus,
            price,
            outcomes[0],
            interval.attainment(outcomes),
            interval.confidence(outcomes, self.spec.slo.target),
            goodput / gpus,
            goodput * 3600 / price,
            tuple(
                (load.seed, outcome.attainment)
                for load, outcome in zip(loads[1:], outcomes[1:], strict=True)
            ),
        )

    async def around(self, hunt: Hunt, choice: Choice, rate_rps: float) -> dict[str, Any]:
        """Capacity, first bottleneck, and what the profile's error does to the plan."""
        (capacity, over), with_error = await asyncio.gather(
            self.capacity(hunt, choice.candidate, rate_rps, CAPACITY_SEEDS),
            self.with_error(hunt, choice, rate_rps),
        )
        return {
            "capacity_rps": capacity,
            "bottleneck": bottleneck(over, choice.candidate.system),
            "with_error": with_error,
        }

    async def capacity(
        self, hunt: Hunt, candidate: Candidate, rate_rps: float, seeds: int
    ) -> tuple[Estimate, Outcome]:
        """In requests a second, and a whole run just above it."""
        low, high = await hunt.bracket(candidate)
        held, missed = await asyncio.gather(
            self.seeded(hunt, candidate, low or high, seeds),
            self.seeded(hunt, candidate, high, seeds),
        )
        if not low:
            return Estimate(0.0, 0.0, high * rate_rps), missed[0]
        found = interval.capacity(
            (low * rate_rps, held), (high * rate_rps, missed), self.spec.slo.target
        )
        return found, missed[0]

    async def seeded(
        self, hunt: Hunt, candidate: Candidate, speed: float, seeds: int
    ) -> Sequence[Outcome]:
        loads = [
            msgspec.structs.replace(at(hunt.load, speed), seed=self.spec.seed + place)
            for place in range(seeds)
        ]
        return await self.lab.outcomes([hunt.trial(candidate, load) for load in loads])

    async def with_error(self, hunt: Hunt, choice: Choice, rate_rps: float) -> WithError | None:
        """All times longer, then all shorter, by what the profile's error says."""
        prefill, decode = errors_of(hunt.machine)
        if not (prefill or decode):
            return None
        slower = self.scaled(hunt, 1 + prefill, 1 + decode)
        faster = self.scaled(hunt, 1 / (1 + prefill), 1 / (1 + decode))
        candidate, is_split = choice.candidate, choice.candidate.system == "disaggregated"
        base = candidate.with_split(0, 0)

        async def nodes(hunt: Hunt) -> int | None:
            if is_split:
                found = await hunt.best_split(base)
            else:
                found = await hunt.best_colocated(self.spec.limits.nodes)
            return None if found is None else found.nodes

        worst, best, slow, fast, most, fewest = await asyncio.gather(
            slower.outcome(candidate, is_whole=True),
            faster.outcome(candidate, is_whole=True),
            slower.bracket(candidate, ERROR_PRECISION),
            faster.bracket(candidate, ERROR_PRECISION),
            nodes(slower),
            nodes(faster),
        )
        return WithError(
            prefill, decode,
            interval.attainment([worst]).low, interval.attainment([best]).high,
            slow[0] * rate_rps, fast[1] * rate_rps, fewest, most,
        )  # fmt: skip  # one field a line hides what is built

    def scaled(self, hunt: Hunt, prefill: float, decode: float) -> Hunt:
        bound = self.demands[hunt.load.users].bound(hunt.load, hunt.profile, self.spec.slo)
        return Hunt(self.lab, self.spec, hunt.machine, hunt.load, bound, (prefill, decode))

    # ---- against what --------------------------------------------------------------------------

    async def baselines(self, hunt: Hunt, choice: Choice, offer: Offer) -> dict[str, Any]:
        """The cheapest of each system, and colocated instances on the plan's own nodes."""
        like = offer.colocated or hunt.colocated_variants()[0]
        admission = choice.candidate.option("conductor.admission", "")
        same = msgspec.structs.replace(like, colocated=choice.nodes)
        same = same.with_options(conductor__admission=admission)
        wanted = (offer.disaggregated, offer.colocated, same)
        found = await asyncio.gather(
            *(self.choice(hunt, one, 0) for one in wanted if one is not None)
        )
        by_candidate = {one.candidate: one for one in found}
        cheapest = [by_candidate[one] if one is not None else None for one in wanted]
        return {
            "disaggregated": cheapest[0],
            "colocated": cheapest[1],
            "colocated_same_nodes": cheapest[2],
        }


def repaired(candidate: Candidate, outcome: Outcome) -> Candidate:
    """With one node more of the role that gave out, or one prefill group."""
    if candidate.system == "colocated":
        return msgspec.structs.replace(candidate, colocated=candidate.colocated + 1)
    width = int(candidate.option("prefill.nodes_per_group", 1))
    if bottleneck(outcome, candidate.system).startswith("decode"):
        return candidate.with_split(candidate.prefill, candidate.decode + 1)
    return candidate.with_split(candidate.prefill + width, candidate.decode)


def share_of_decode(bound: Bound) -> float:
    """Of the nodes, by the lower bound."""
    return bound.decode_nodes / max(bound.prefill_nodes + bound.decode_nodes, 1e-9)
