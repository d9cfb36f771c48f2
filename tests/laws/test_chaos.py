"""Do the laws hold whatever fails when? 500 seeds, each a small cluster whose instances are lost.

The schedules are those of the live chaos run (`tests/bench/chaos.py`), in virtual time. A killed
instance is lost at once; nobody new is sent to one that has stopped, which is lost once its silence
has lasted; both are back a while later. As many losses come closer together than live, and now
and then all instances of a kind are gone.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from functools import partial
from itertools import pairwise
from typing import Any, get_args

import pytest

from reference_cluster.cluster import Cluster
from reference_cluster.config import System
from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.request import Request, Sink
from tests.faults import Fault, schedule
from tests.laws.test_laws import Case, Observer, sections
from tests.reference_cluster.small import ROUGH, a_config, held, random_requests, served

SEEDS = 500
FAULTS = 20
SHUNNED_S, LOST_S = 0.5, 1.5  # After a worker has stopped; it is hung until then.
Look = tuple[float, Any]


class Client(Sink):
    """Counts what it is told."""

    def __init__(self) -> None:
        self.tokens_heard = 0
        self.ends = 0
        self.has_left = False  # To the end of the span under way its tokens are made all the same.

    def tokens(self, count: int) -> None:
        assert self.has_left or not self.ends, "a token after the end"
        self.tokens_heard += count

    def ended(self, request: Request) -> None:
        self.ends += 1
        self.has_left = request.reason == "client disconnected"


def case_of(seed: int) -> tuple[Case, list[Look]]:
    """A cluster, its requests and cancels, and everything that fails."""
    rng = random.Random(seed)
    parts = sections(lambda *options: rng.choice(options))
    width = parts["prefill"]["nodes_per_group"] = rng.choice((1, 1, 3))
    parts["failure"] = {"resume": rng.random() < 0.8, "replacements_max": rng.choice((0, 1, 2, 9))}
    config = a_config(
        system=rng.choice(get_args(System)),
        prefill_instances=rng.randint(1, 3) * width,
        decode_instances=rng.randint(1, 3),
        colocated_instances=rng.randint(1, 3),
        sample_every_s=rng.choice((0.3, 1e3)),
        seed=seed,
        **parts,
    )
    requests = random_requests(seed, rng.randint(1, 40), rng.choice((0.05, 0.2, 0.4)))
    for request in requests:
        request.sink = Client()
    gone = rng.sample(requests, rng.randint(0, len(requests) // 4))
    cancels = [(one.timeline.arrived_s + rng.expovariate(0.5), one) for one in gone]
    end_s = requests[-1].timeline.arrived_s + 5.0
    case = Case(config, requests, cancels, [rng.uniform(0.0, end_s) for _ in range(12)])
    faults = schedule(seed, config.instance_names, FAULTS, 0.0, end_s / FAULTS)
    return case, [*happenings(rng, faults), (end_s + 60.0, partial(rejoin_all, config))]


def happenings(rng: random.Random, faults: list[Fault]) -> list[Look]:
    """What the Conductor notices of these faults, and when."""
    found: list[Look] = []
    for fault in faults:
        at_s = fault.at_s
        if fault.kind == "stop":
            found.append((at_s + SHUNNED_S, shunned(fault.name)))
            at_s += LOST_S
        found.append((at_s, lambda cluster, name=fault.name: cluster.lose(name)))
        back_s = at_s + rng.choice((0.0, rng.expovariate(1.0), rng.expovariate(0.2)))
        found.append((back_s, lambda cluster, name=fault.name: cluster.rejoin(name)))
    return found


def shunned(name: str) -> Any:
    def act(cluster: Cluster) -> None:
        cluster.shun(name, True)

    return act


def rejoin_all(config: Any, cluster: Cluster) -> None:
    for name in config.instance_names:
        cluster.rejoin(name)
        cluster.shun(name, False)


# ---- laws ------------------------------------------------------------------------------------


def follows_the_pools(index: PrefixIndex, cluster: Cluster) -> None:
    """index: an instance is said to hold what is in its pool or on its SSD, and to have promised
    what waits there; a lost one nothing."""
    for one in [*cluster.prefill, *cluster.colocated]:
        here = {*one.pool.pins, *one.pool.idle}
        if getattr(one, "ssd", None) is not None:
            here |= {*one.ssd.blocks.pins, *one.ssd.blocks.idle}
        said = {block for block, bits in index.holders.items() if bits >> one.id & 1}
        assert said == here, f"{one.name}: {len(said)} blocks by the index, {len(here)} there"
        promised = {block for block, bits in index.promises.items() if bits >> one.id & 1}
        assert promised == set(getattr(one, "promised", ()))
        assert one.name not in cluster.lost or not (here or promised)


class ChaosObserver(Observer):
    """Looks at what must hold at every moment, losses or not."""

    def look(self, cluster: Cluster) -> None:
        super().look(cluster)
        follows_the_pools(cluster.index, cluster)
        self.seen["some lost"] += bool(cluster.lost)
        self.seen["all lost"] += len(cluster.lost) == len(cluster.instances)
        self.seen["waiting for an instance"] += bool(cluster.recovery.homeless)
        assert cluster.recovery.homeless.keys() <= cluster.in_flight.keys()


def ended_as_it_may(request: Request, case: Case) -> None:
    """conservation: one end each, of a known kind; and whoever finished has all tokens, once."""
    sink = request.sink
    assert isinstance(sink, Client)
    assert sink.ends == 1
    assert sink.has_left or sink.tokens_heard == request.produced_tokens
    assert sink.tokens_heard <= request.output_tokens
    assert request.status in ("finished", "rejected", "failed")
    assert (request.reason is None) == (request.status == "finished")
    most = case.config.failure.replacements_max
    assert request.replacements <= most + 1
    stamps = [at_s for at_s in dataclasses.astuple(request.timeline)[:9] if at_s is not None]
    assert stamps == sorted(stamps), request.timeline
    if request.status == "rejected":
        assert not sink.tokens_heard, "refused after its first token"
    if request.status == "finished":
        was_served_whole(request)


def was_served_whole(request: Request) -> None:
    """reuse: reused + computed = input; tokens: as many as asked for, each later than the last."""
    assert request.produced_tokens == request.output_tokens
    assert request.prefilled_tokens == request.input_tokens
    assert 0 <= request.reused_tokens < request.input_tokens
    steps = sum(sum(log.steps[first:past]) for log, first, past in request.memberships)
    # Every attempt that had a first token got it by a prefill, all others by steps.
    firsts = request.output_tokens - steps
    assert 1 <= firsts <= 1 + request.replacements
    starts = [log.start_s[first] for log, first, past in request.memberships if past > first]
    assert all(later > earlier for earlier, later in pairwise(starts))


def observed(seed: int) -> tuple[Counter[str], Cluster]:
    """Run one seed, check every law; what has happened in it."""
    case, happening = case_of(seed)
    observer = ChaosObserver(case)
    looks = [(at_s, observer.look) for at_s in case.look_times] + happening
    cluster = served(case.config, case.requests, case.cancels, ROUGH, looks=looks)
    assert held(cluster) == []
    follows_the_pools(cluster.index, cluster)
    assert not cluster.recovery.attempts
    assert not cluster.recovery.homeless
    assert not cluster.lost
    assert cluster.counts.total() == len(case.requests)
    for request in case.requests:
        ended_as_it_may(request, case)
        observer.seen[f"{request.status} {request.reason or ''}".strip()] += 1
        observer.seen["finished after a loss"] += bool(
            request.replacements and request.status == "finished"
        )
    observer.seen.update(cluster.recovery.counts)
    return observer.seen, cluster


MUST_HAPPEN = (
    "some lost",
    "all lost",
    "waiting for an instance",
    "replaced",
    "resumed",
    "finished after a loss",
    "finished",
    "failed lost-prefill",
    "failed lost-decode",
    "failed lost-colocated",
    "failed client disconnected",
    "rejected no-instance",
    "rejected ttft-after-loss",
)


@pytest.mark.timeout(240)
def test_no_law_is_broken_whatever_is_lost() -> None:
    """500 seeds; and what the laws are about has happened there, each thing often."""
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        try:
            seen.update(observed(seed)[0])
        except Exception as error:
            error.add_note(f"with seed {seed}")
            raise
    rare = {what: seen[what] for what in MUST_HAPPEN if seen[what] < 5}
    assert not rare, seen


@pytest.mark.parametrize("seed", range(10))
def test_faults_too_are_determined_by_the_seed(seed: int) -> None:
    """determinism: the same seed twice gives the same ends, to the last bit."""
    ends = []
    for _ in range(2):
        case, happening = case_of(seed)
        served(case.config, case.requests, case.cancels, ROUGH, looks=happening)
        ends.append([
            (dataclasses.astuple(one.timeline), one.status, one.reason, one.prefill, one.decode)
            for one in case.requests
        ])  # fmt: skip  # the row belongs together
    assert ends[0] == ends[1]
