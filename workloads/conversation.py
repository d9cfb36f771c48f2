"""How do people talk to a chat service? Sessions that come back, as in Mooncake's traces.

The tables are quantiles measured on Mooncake's conversation trace (12,031 requests, one hour):
a statistical description, none of its rows.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from workloads.model import Floats, Ints, Random

LEVELS = np.array(
    [0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1]
)


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one population behaves. Tables are quantiles at LEVELS; tokens and seconds.

    The defaults are those of Mooncake's conversation trace.
    """

    share: float = 1.0  # Of all requests.
    system_tokens: int = 512  # Common to all its prompts.
    reuse: float = 0.45  # Share of requests that continue a session.
    edited: float = 0.18  # Of those, with an edited or cut history.
    later: float = 0.56  # Of those, that continue a continuation.
    # Shorter requests are one-shot calls: 2 % of them are continued, 42 % of the others.
    continuable_tokens: int = 1000
    # Documents are pasted early in a session; later turns grow by less.
    later_growth_tokens: float = 6000.0
    # fmt: off
    # Input tokens of a session's first request, and of a later one.
    first_input: tuple[float, ...] = (
        891, 894, 897, 904, 1077, 1668, 3778, 5114, 7112, 10359, 15513, 25373, 37834, 65901, 91142,
        111632, 126195)
    later_input: tuple[float, ...] = (
        892, 1163, 1634, 2102, 3455, 5502, 7507, 9873, 12556, 15780, 20219, 28908, 40992, 65839,
        79133, 94868, 123194)
    output: tuple[float, ...] = (
        1, 3, 10, 24, 100, 213, 291, 350, 399, 447, 504, 597, 698, 892, 1119, 1568, 2000)
    # Seconds between a request and the next of its session.
    gap_s: tuple[float, ...] = (
        1, 12, 30, 42, 60, 75, 96, 123, 162, 222, 318, 483, 615, 1031, 1477, 1908, 3030)
    # Input tokens by which a request exceeds the one that it continues.
    growth: tuple[float, ...] = (
        0, 0, 20, 64, 192, 313, 395, 471, 553, 684, 1290, 4599, 7339, 11877, 16994, 22493, 60000)
    # Share of the earlier request's blocks that one with an edited or cut history keeps (15 % of
    # continuations show it; a share near 1 does not).
    kept: tuple[float, ...] = (
        0.01, 0.03, 0.05, 0.07, 0.1, 0.13, 0.17, 0.21, 0.29, 0.4, 0.52, 0.83, 0.91, 0.93, 0.96,
        0.96, 0.99)
    # fmt: on


CONVERSATION = Shape()

# The next three were fitted, so that session sizes, block reuse and the LRU curve come out right.
# How much each earlier turn makes a session likelier to go on (in units of a log length ratio).
DEPTH_BONUS = 0.05
# Matching finds parents a little too long (short ones are one-shots); this takes it back.
MATCH = 0.91
# Requests looked at on either side of the moment that a gap points to.
REACH = 200
# Lengths are drawn in strata of so many, so that a window of a minute has the mix of the hour.
STRATUM = 50


@dataclass(slots=True)
class Turn:
    """A request of a session: what a later one may continue."""

    input_tokens: int
    output_tokens: int
    ids: list[int]
    depth: int  # requests of its session before it
    is_continued: bool = False


@dataclass(slots=True)
class Conversations:
    """Makes requests one after another, each new or continuing an earlier one.

    `reuse` is the share of requests that continue a session (those whose earlier request lies
    before the trace's start appear without a known prefix, as in any recorded trace).
    """

    random: Random
    block_tokens: int
    reuse: float
    length_scale: float = 1.0
    output_scale: float = 1.0
    shape: Shape = CONVERSATION
    next_id: int = 0
    system: list[int] = field(default_factory=list)

    def run(self, arrival_s: Floats) -> list[Turn]:
        """One turn per arrival (seconds, sorted), with ids of its own numbering from next_id."""
        n = len(arrival_s)
        self.system = self.fresh(self.shape.system_tokens // self.block_tokens)
        first = self._lengths(self.shape.first_input, n)
        later = self._lengths(self.shape.later_input, n)
        output = stratified(self.random, self.shape.output, n) * self.output_scale
        growth = at(self.shape.growth, self.random.random(n))
        gap_s = at(self.shape.gap_s, self.random.random(n))
        is_later = self.random.random(n) < self.reuse
        times: list[float] = arrival_s.tolist()
        turns: list[Turn] = []
        for i, now_s in enumerate(times):
            out = max(1, round(float(output[i])))
            then_s = now_s - float(gap_s[i])
            parent = None
            if is_later[i] and then_s >= 0:
                parent = self._continued(turns, times, then_s, now_s, float(later[i] - growth[i]))
            if parent is not None:
                turns.append(self._later(parent, float(later[i]), float(growth[i]), out))
            else:
                # A session that began before the trace has the length of a later turn already.
                length = later[i] if is_later[i] else first[i]
                turns.append(self._first(round(float(length)), out))
        return turns

    def _lengths(self, table: Sequence[float], n: int) -> Floats:
        """Input lengths after a table, scaled; never below the table's own minimum."""
        return np.maximum(stratified(self.random, table, n) * self.length_scale, table[0])

    def _continued(
        self, turns: list[Turn], times: list[float], then_s: float, now_s: float, length: float
    ) -> Turn | None:
        """The earlier request to continue: near `then_s`, and of a length that fits."""
        # A tenth of the gap to either side, but a few requests at least.
        reach_s = (now_s - then_s) * 0.1
        middle = bisect_left(times, then_s)
        low = min(bisect_left(times, then_s - reach_s), middle - 3)
        high = max(bisect_left(times, then_s + reach_s), middle + 3)
        low, high = max(low, middle - REACH, 0), min(high, middle + REACH, len(turns))
        length = max(length * MATCH, self.shape.continuable_tokens)
        wants_later = self.random.random() < self.shape.later
        best, best_cost = None, 3.0
        for turn in turns[low:high]:
            if turn.is_continued or turn.input_tokens < self.shape.continuable_tokens:
                continue
            cost = abs(math.log(turn.input_tokens / length))
            # The kind of parent outweighs the fit, and long sessions tend to grow longer.
            cost += 1.0 if (turn.depth > 0) != wants_later else 0.0
            cost -= DEPTH_BONUS * min(turn.depth, 10)
            if cost < best_cost:
                best, best_cost = turn, cost
        return best

    def _first(self, length: int, output: int) -> Turn:
        """A request that shares the system prompt alone."""
        return self.turn(self.system[: length // self.block_tokens], length, output)

    def _later(self, parent: Turn, length: float, growth: float, output: int) -> Turn:
        """A request that continues `parent`: with all of its input, or an edited history."""
        parent.is_continued = True
        depth = parent.depth + 1
        whole = parent.input_tokens // self.block_tokens
        if self.random.random() < self.shape.edited:
            kept = max(len(self.system), int(whole * at(self.shape.kept, self.random.random())))
            cut = max(round(length), kept * self.block_tokens + 1)
            return self.turn(parent.ids[:kept], cut, output, depth)
        if round(growth) == 0:  # asked again: the very same prompt
            return Turn(parent.input_tokens, output, parent.ids, depth)
        if parent.depth:  # pasted documents come early in a session
            growth = min(growth, self.shape.later_growth_tokens)
        grown = parent.input_tokens + round(growth)
        grown = min(grown, max(int(self.shape.later_input[-1]), parent.input_tokens))
        return self.turn(parent.ids[:whole], grown, output, depth)

    def turn(self, prefix: list[int], length: int, output: int, depth: int = 0) -> Turn:
        """A request of `length` tokens that starts with the whole blocks of `prefix`."""
        blocks = -(-length // self.block_tokens)
        return Turn(length, output, prefix + self.fresh(blocks - len(prefix)), depth)

    def fresh(self, count: int) -> list[int]:
        """So many ids never used before."""
        self.next_id += count
        return list(range(self.next_id - count, self.next_id))


def at(table: Sequence[float], level: float | Floats) -> Floats:
    """The value of a quantile table at a level in [0, 1), or at many."""
    return np.asarray(np.interp(level, LEVELS, table), dtype=np.float64)


def stratified(random: Random, table: Sequence[float], n: int) -> Floats:
    """n values after a quantile table, their levels from `even_levels`."""
    return at(table, even_levels(random, n))


def even_levels(random: Random, n: int) -> Floats:
    """n numbers in [0, 1) in random order, every STRATUM in a row spread evenly."""
    rounds = -(-n // STRATUM)
    # Ranks of random numbers: a random order of the strata in every round.
    order: Ints = np.argsort(random.random((rounds, STRATUM)), axis=1)
    levels: Floats = (order + random.random((rounds, STRATUM))) / STRATUM
    return levels.reshape(-1)[:n]
