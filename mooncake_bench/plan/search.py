"""Which is the cheapest cluster that keeps the promise? Bisection from below, then one by one.

More nodes never do worse, so that a split which misses rules out all that it contains, and none of
those is run: the search bisects prefill nodes beside generous decode nodes, then decode nodes, then
looks for a cheaper neighbour. Each run that cannot reach the target any more stops there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import msgspec

from mooncake_bench.plan.bound import Bound
from mooncake_bench.plan.candidate import Candidate, Load, Trial, Value, price_per_hour
from mooncake_bench.plan.lab import Lab, at
from mooncake_bench.plan.outcome import Outcome
from mooncake_bench.plan.spec import Machine, Spec, profile_of

COLOCATED_FACTOR = 4  # A baseline that needs more than so many times the nodes is not looked for.
CAPACITY_PRECISION = 1.03
SPEED_MIN = 0.02  # A cluster that cannot take this share of the load has no capacity.


class Tried(msgspec.Struct, frozen=True):
    """A setting that could have made the cluster cheaper, and whether it did."""

    setting: str
    value: Value
    split: str
    attainment: float
    is_upper_bound: bool
    is_adopted: bool


class Hunt:
    """Searches among clusters of one machine under one load, with times scaled by an error."""

    def __init__(
        self,
        lab: Lab,
        spec: Spec,
        machine: Machine,
        load: Load,
        bound: Bound,
        scales: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        self.lab = lab
        self.spec = spec
        self.machine = machine
        self.load = load
        self.bound = bound.scaled(*scales)
        self.scales = scales
        self.profile = profile_of(machine)

    # ---- trying --------------------------------------------------------------------------------

    def trial(self, candidate: Candidate, load: Load | None = None) -> Trial:
        return Trial(candidate, load or self.load, *self.scales)

    async def outcome(self, candidate: Candidate, is_whole: bool = False) -> Outcome:
        return await self.lab.outcome(self.trial(candidate), is_whole)

    async def holds(self, candidate: Candidate) -> bool:
        return (await self.outcome(candidate)).holds(self.spec.slo.target)

    def price(self, candidate: Candidate) -> float:
        return price_per_hour(candidate, self.machine, self.profile, self.spec.prices)

    # ---- disaggregated -------------------------------------------------------------------------

    def base(self) -> Candidate:
        """The first of each list of settings."""
        options: dict[str, Value] = {}
        for name, value in self.settings():
            options.setdefault(name, value)
        chosen = {name: value for name, value in options.items() if is_said(name, value)}
        found = Candidate(self.machine.profile, "disaggregated")
        return found.with_options(**{name.replace(".", "__"): one for name, one in chosen.items()})

    async def best_split(self, base: Candidate, most: int | None = None) -> Candidate | None:
        """The split with the fewest nodes that holds; None where more than `most` are needed."""
        most = self.spec.limits.nodes if most is None else most
        width = int(base.option("prefill.nodes_per_group", 1))
        groups = whole(self.bound.prefill_nodes / width)
        least = whole(self.bound.decode_nodes)
        generous = 2 * least + 1

        async def prefill_holds(count: int) -> bool:
            return await self.holds(base.with_split(count * width, generous))

        async def decode_holds(count: int) -> bool:
            return await self.holds(base.with_split(enough * width, count))

        found = await smallest(groups, (most - least) // width, prefill_holds)
        if found is None:
            return None
        enough = found
        fewest = await smallest(least, generous, decode_holds)
        best = base.with_split(enough * width, generous if fewest is None else fewest)
        best = await self.improved(best, width)
        return best if best.nodes <= most else None

    async def improved(self, best: Candidate, width: int) -> Candidate:
        """A neighbour with more prefill nodes and fewer decode nodes, where it is better."""
        for fewer in range(1, best.decode):
            rival = best.with_split(best.prefill + width, best.decode - fewer)
            if rival.nodes > best.nodes:
                continue
            if not await self.holds(rival):
                break
            if rival.nodes < best.nodes:
                best = rival
                continue
            ours, theirs = await self.outcome(best), await self.outcome(rival)
            best = rival if theirs.attainment > ours.attainment else best
        return best

    # ---- settings ------------------------------------------------------------------------------

    def settings(self) -> list[tuple[str, Value]]:
        """Every setting of a disaggregated cluster with each of its values, in the order to try.

        Pool and links are cut to the limits; 0 stands for the profile's own.
        """
        limits, profile = self.spec.limits, self.profile
        most: dict[str, float | None] = {
            "dram_tokens": limits.dram_tokens,
            "link_bytes_per_s": limits.link_bytes_per_s,
        }
        own = {
            "dram_tokens": profile.dram_kv_tokens,
            "link_bytes_per_s": profile.link_bytes_per_s,
        }
        found: list[tuple[str, Value]] = []
        for name, key in SETTINGS.items():
            for value in getattr(self.spec.search, name):
                limit = most.get(name)
                is_over = limit is not None and (value or own[name]) > limit
                found.append((key, type(value)(limit) if is_over else value))
        return found

    async def with_settings(self, best: Candidate) -> tuple[Candidate, list[Tried]]:
        """Try every other setting on a cheaper cluster; keep what holds there, and go on."""
        tried: list[Tried] = []
        seen: dict[str, Value] = {}
        for name, value in self.settings():
            if name not in seen:
                seen[name] = value  # Where the search began.
                continue
            if value == seen[name]:
                continue
            changed = best.with_options(**{name.replace(".", "__"): value})
            cheaper = await self.cheapest_below(changed, self.price(best), tried, name, value)
            best = cheaper or best
        return best, tried

    async def cheapest_below(
        self, changed: Candidate, price: float, tried: list[Tried], name: str, value: Value
    ) -> Candidate | None:
        best: Candidate | None = None
        while True:
            rivals = [one for one in self.neighbours(best or changed) if self.price(one) < price]
            outcomes = [await self.outcome(one) for one in rivals]
            held = [
                (one, outcome)
                for one, outcome in zip(rivals, outcomes, strict=True)
                if outcome.holds(self.spec.slo.target)
            ]
            winner = min(held, key=lambda pair: self.price(pair[0]), default=(None, None))[0]
            tried += [
                Tried(name, value, one.split, out.attainment, out.is_stopped, one is winner)
                for one, out in zip(rivals, outcomes, strict=True)
            ]
            if winner is None:
                return best
            best, price = winner, self.price(winner)

    def neighbours(self, one: Candidate) -> list[Candidate]:
        """The same nodes with the setting, and with one prefill group or decode node less."""
        width = int(one.option("prefill.nodes_per_group", 1))
        even = one.prefill // width * width
        found = [one] if even == one.prefill else []
        fewer = even if even < one.prefill else even - width
        if fewer >= width:
            found.append(one.with_split(fewer, one.decode))
        if one.decode > 1 and even == one.prefill:
            found.append(one.with_split(one.prefill, one.decode - 1))
        return found

    # ---- colocated -----------------------------------------------------------------------------

    def colocated_variants(self) -> list[Candidate]:
        """One colocated instance, in every way that the baseline may be tuned."""
        search = self.spec.search
        ways: list[dict[str, Value]] = []
        for batching in search.colocated_batching:
            budgets = search.colocated_step_tokens if batching == "chunked" else (0,)
            ways += [
                {"batching": batching, "step_tokens_max": budget, "admission": admission}
                for admission in search.admission
                for budget in budgets
            ]
        return [colocated(self.machine.profile, way) for way in ways]

    async def best_colocated(self, most: int) -> Candidate | None:
        """The fewest colocated instances that hold, over all ways to tune them."""
        most = min(most, self.spec.limits.nodes)
        least = whole(self.bound.prefill_nodes + self.bound.decode_nodes)
        best: Candidate | None = None
        for base in self.colocated_variants():

            async def enough(count: int, base: Candidate = base) -> bool:
                return await self.holds(msgspec.structs.replace(base, colocated=count))

            # One that does not hold on fewer nodes than the best is not worth a search.
            if best is None or (best.nodes > least and await enough(best.nodes - 1)):
                found = await smallest(least, best.nodes - 1 if best else most, enough)
                if found is not None:
                    best = msgspec.structs.replace(base, colocated=found)
        return best

    # ---- capacity ------------------------------------------------------------------------------

    async def bracket(
        self, candidate: Candidate, precision: float = CAPACITY_PRECISION
    ) -> tuple[float, float]:
        """Speeds, as factors of the load's own: the highest that holds, the lowest that does not.

        Their ratio is at most `precision`; (0, s) where not even SPEED_MIN holds.
        """

        async def good(speed: float) -> bool:
            outcome = await self.lab.outcome(self.trial(candidate, at(self.load, speed)), False)
            return outcome.holds(self.spec.slo.target)

        step = 1.12
        speed = 1.0
        if await good(speed):
            while await good(rounded(speed * step)):
                speed = rounded(speed * step)
                step **= 1.5
            low, high = speed, rounded(speed * step)
        else:
            while not await good(rounded(speed / step)):
                speed = rounded(speed / step)
                step **= 1.5
                if speed < SPEED_MIN:
                    return 0.0, speed
            low, high = rounded(speed / step), speed
        while high / low > precision:
            middle = rounded((low * high) ** 0.5)
            if not low < middle < high:
                break
            low, high = (middle, high) if await good(middle) else (low, middle)
        return low, high


SETTINGS = {
    "scheduling": "conductor.scheduling",
    "admission": "conductor.admission",
    "nodes_per_group": "prefill.nodes_per_group",
    "dram_tokens": "prefill.dram_tokens",
    "ssd_tokens": "prefill.ssd_tokens",
    "link_bytes_per_s": "network.link_bytes_per_s",
}
DEFAULTS: dict[str, Value] = {
    "conductor.scheduling": "kvcache-centric",
    "conductor.admission": "accept-all",
    "prefill.nodes_per_group": 1,
}


def is_said(name: str, value: Value) -> bool:
    """Is it something else than a cluster's default? 0 stands for the profile's own."""
    return value != DEFAULTS.get(name, 0)


def colocated(profile: str, way: Mapping[str, Value]) -> Candidate:
    """One instance of the baseline: as vLLM, with prefix caching."""
    return Candidate(profile, "colocated", colocated=1).with_options(
        colocated__batching=way["batching"],
        colocated__prefix_caching=True,
        colocated__step_tokens_max=way["step_tokens_max"],
        conductor__admission="" if way["admission"] == "accept-all" else way["admission"],
    )


async def smallest(low: int, high: int, holds: Callable[[int], Awaitable[bool]]) -> int | None:
    """The smallest count in [low, high] that holds, taking more to hold if fewer do."""
    if low > high:
        return None
    known, step = low, 1
    while not await holds(known):
        if known == high:
            return None
        low = known + 1
        known, step = min(known + step, high), step * 2
    while low < known:
        middle = (low + known) // 2
        if await holds(middle):
            known = middle
        else:
            low = middle + 1
    return known


def whole(nodes: float) -> int:
    """At least one."""
    return max(1, -int(-nodes // 1))


def rounded(speed: float) -> float:
    """To four digits, so that a resumed search asks for the very same runs."""
    return float(f"{speed:.4g}")
