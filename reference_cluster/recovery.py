"""What becomes of a request whose instance was lost? It is tried again elsewhere, or ends with why.

Before its first token it is placed anew, within its TTFT SLO. A stream goes on where it broke off:
another instance prefills the prompt and the tokens so far, which gives the next token. Each try is
an attempt, a request of its own that stands in for the client's (`Request.client`), so that nothing
that still happens to the one that was given up can be taken for news.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from typing import Protocol

from reference_cluster.blocks import blocks_of_resumed
from reference_cluster.conductor import Conductor
from reference_cluster.config import ClusterConfig
from reference_cluster.policies.admission import Rejected
from reference_cluster.policies.scheduling import Placement
from reference_cluster.request import Request, Timeline


class Placing(Protocol):
    """What recovery needs of the cluster."""

    in_flight: dict[int, Request]
    conductor: Conductor

    def dispatch(self, request: Request, placement: Placement) -> None: ...

    def withdraw(self, request: Request) -> None: ...

    def ended(self, attempt: Request) -> None: ...


class Recovery:
    """Keeps the attempts of requests that have lost an instance."""

    def __init__(self, cluster: Placing, config: ClusterConfig) -> None:
        self.cluster = cluster
        self.config = config
        self.loop = asyncio.get_running_loop()
        self.ids = itertools.count(-1, -1)  # Never a client's.
        self.attempts: dict[int, Request] = {}  # The latest, by the client's request.
        self.homeless: dict[int, asyncio.TimerHandle] = {}  # Attempts that no instance can take.
        self.counts: Counter[str] = Counter()

    def lost(self, name: str) -> None:
        """An instance is lost; whoever had not all it needs from it already is tried again."""
        self.counts["lost_instances"] += 1
        reason = f"lost-{name.rsplit('-', 1)[0]}"
        for request in [one for one in self.cluster.in_flight.values() if depends_on(one, name)]:
            self.again(request, reason)

    def broken(self, id: int, reason: str) -> None:
        """Something that a request needs has failed, though its instances live."""
        if id in self.cluster.in_flight:
            self.again(self.cluster.in_flight[id], reason)

    def again(self, broken: Request, reason: str) -> None:
        """Give an attempt up and begin the next, if there is to be one."""
        self.cluster.withdraw(broken)
        del self.cluster.in_flight[broken.id]
        client = broken.client or broken
        if broken is not client:
            take_over(client, broken)
        elif not client.produced_tokens:
            client.timeline = Timeline(client.timeline.arrived_s)
        attempt = self.attempts[client.id] = self.next_attempt(client)
        client.replacements += 1
        has_begun = client.produced_tokens > 0
        settings = self.config.failure
        may = client.replacements <= settings.replacements_max
        if not may or (has_begun and not settings.resume):
            self.end(attempt, reason)
        else:
            self.counts["resumed" if has_begun else "replaced"] += 1
            self.place(attempt)

    def next_attempt(self, client: Request) -> Request:
        """What is left to do of a client's request, as one of its own."""
        produced, tokens = client.produced_tokens, self.config.block_tokens
        blocks = client.blocks
        if produced:
            blocks = blocks_of_resumed(blocks, client.input_tokens, produced, tokens, client.id)
        return Request(
            next(self.ids),
            client.input_tokens + produced,
            client.output_tokens - produced,
            blocks,
            Timeline(client.timeline.arrived_s),
            client.sink,
            client=client,
            prompt=[*client.prompt, *client.output] if client.prompt else (),
            output=client.output,
            said=[*client.output],
            sampling=client.sampling,
            tenant=client.tenant,
        )

    def place(self, attempt: Request) -> None:
        """Find it another place; where there is none, wait for one as long as its SLO allows."""
        now_s, slo_s = self.loop.time(), self.config.slo.ttft_s
        in_flight = self.cluster.in_flight
        in_flight.pop(attempt.id, None)
        decision = self.cluster.conductor.decide(attempt, in_flight.values(), now_s)
        in_flight[attempt.id] = attempt
        waited_s = 0.0 if is_stream(attempt) else now_s - attempt.timeline.arrived_s
        if isinstance(decision, Rejected):
            if decision.reason == "no-instance" and waited_s < slo_s:
                self.wait(attempt, slo_s - waited_s)
            else:
                self.end(attempt, decision.reason)
        elif not is_stream(attempt) and waited_s + decision.ttft_s > slo_s:
            self.end(attempt, "ttft-after-loss")
        else:
            self.housed(attempt)
            self.cluster.dispatch(attempt, decision)

    def wait(self, attempt: Request, for_s: float) -> None:
        """Until an instance joins; nobody is to count on when that will be."""
        attempt.timeline.placed_s, attempt.predicted_ttft_s = self.loop.time(), float("inf")
        if attempt.id not in self.homeless:
            timer = self.loop.call_later(for_s, self.end, attempt, "no-instance")
            self.homeless[attempt.id] = timer

    def joined(self) -> None:
        """An instance is back: whoever waits for one may have it."""
        for id in [*self.homeless]:
            self.place(self.cluster.in_flight[id])

    def end(self, attempt: Request, reason: str) -> None:
        """There will be no other: a stream that broke has failed, what never began was refused
        late, or has failed as often as it may."""
        assert attempt.client is not None
        is_refused = reason in ("no-instance", "ttft", "tbt", "capacity", "ttft-after-loss")
        is_rejected = is_refused and not is_stream(attempt)
        attempt.status, attempt.reason = ("rejected" if is_rejected else "failed"), reason
        attempt.is_cancelled, attempt.predicted_ttft_s = True, None
        self.cluster.in_flight[attempt.id] = attempt
        self.cluster.ended(attempt)

    def settle(self, attempt: Request) -> Request:
        """An attempt has ended, and with it the client's request, which is returned."""
        client = attempt.client
        if client is None:
            return attempt
        self.housed(attempt)
        del self.attempts[client.id]
        # A stream that a decode instance refuses to go on with is broken: nobody can refuse it now.
        is_broken = is_stream(attempt) and attempt.status == "rejected"
        take_over(client, attempt)
        client.status, client.reason = "failed" if is_broken else attempt.status, attempt.reason
        client.timeline.finished_s = attempt.timeline.finished_s
        return client

    def housed(self, attempt: Request) -> None:
        timer = self.homeless.pop(attempt.id, None)
        if timer is not None:
            timer.cancel()


def is_stream(attempt: Request) -> bool:
    """Has the client tokens already?"""
    return attempt.client is not None and attempt.client.produced_tokens > 0


def depends_on(request: Request, name: str) -> bool:
    """Would it notice that this instance is lost? A prefill is needed until all KV has left it."""
    if request.prefill == request.decode == name:
        return True
    if request.prefill == name:
        return request.timeline.transferred_s is None
    return request.decode == name and request.output_tokens > 1


def take_over(client: Request, attempt: Request) -> None:
    """Add to a client's request what an attempt of it has come to.

    What was reused and computed is that of the attempt that gave the first token; the time that
    engines spent is that of all.
    """
    is_first = not client.produced_tokens
    client.produced_tokens += attempt.produced_tokens
    client.has_stopped = attempt.has_stopped
    client.prefill_busy_s += attempt.prefill_busy_s
    client.memberships += attempt.memberships
    client.prefill = attempt.prefill or client.prefill
    client.decode = attempt.decode or client.decode
    client.predicted_ttft_s = client.predicted_ttft_s or attempt.predicted_ttft_s
    client.predicted_tbt_s = client.predicted_tbt_s or attempt.predicted_tbt_s
    if client.prefix_replicas is None:
        client.prefix_replicas = attempt.prefix_replicas
    if is_first:
        client.reused_tokens = attempt.reused_tokens
        client.fetched_tokens = attempt.fetched_tokens
        client.prefilled_tokens = attempt.prefilled_tokens
        if attempt.produced_tokens or attempt.has_ended:
            client.timeline = attempt.timeline
