"""Which workers are there, and how fresh is what is known of them? Bookkeeping only, no sockets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from reference_cluster.messages import Beat, Hello, Peer

State = Literal["starting", "member", "lost"]


@dataclass(slots=True)
class Member:
    """One worker's place; whoever says hello under its name takes it."""

    name: str
    state: State = "starting"
    hello: Hello | None = None
    identity: bytes = b""  # Of its process, as it calls itself on its line.
    seen_s: float = 0.0  # Its last sign of life.
    beat: Beat | None = None
    is_silent: bool = False  # For long enough that nobody is sent there.
    starts: int = 0
    reason: str | None = None  # Why it was lost, the last time.


class Membership:
    """All workers that the configuration names."""

    def __init__(self, names: Sequence[str]) -> None:
        self.members = {name: Member(name) for name in names}
        self.by_identity: dict[bytes, Member] = {}

    def enter(self, identity: bytes, hello: Hello, now_s: float) -> Member:
        """A process says hello; its predecessor has been lost before."""
        member = self.members[hello.name]
        assert member.state != "member"
        member.state, member.hello, member.identity = "member", hello, identity
        member.seen_s, member.beat, member.is_silent = now_s, None, False
        member.starts += 1
        self.by_identity[identity] = member
        return member

    def leave(self, name: str, reason: str) -> None:
        member = self.members[name]
        member.state, member.reason, member.beat = "lost", reason, None
        self.by_identity.pop(member.identity, None)

    @property
    def missing(self) -> list[str]:
        return [one.name for one in self.members.values() if one.state != "member"]

    def silent(self, now_s: float, for_s: float) -> list[Member]:
        """Members without a sign of life for so long."""
        return [one for one in self.by_identity.values() if now_s - one.seen_s > for_s]

    def peers(self) -> list[Peer]:
        return [
            Peer(one.name, one.hello.pid, one.hello.address, one.hello.endpoint)
            for one in self.by_identity.values()
            if one.hello is not None
        ]

    def rows(self, now_s: float) -> list[dict[str, Any]]:
        """Every worker for people and tools: state, process, and how old its last report is."""
        return [row(member, now_s) for member in self.members.values()]


def row(member: Member, now_s: float) -> dict[str, Any]:
    beat = member.beat
    endpoint = member.hello.endpoint if member.hello else None
    return {
        "name": member.name,
        "state": member.state,
        "pid": member.hello.pid if member.hello else None,
        "starts": member.starts,
        "segment": endpoint.segment if endpoint else None,
        "age_s": now_s - member.seen_s if member.state == "member" else None,
        "report_age_s": now_s - beat.at_s if beat and member.state == "member" else None,
        "requests": len(beat.requests) if beat else 0,
        "used_blocks": beat.used_blocks if beat else 0,
        "pinned_blocks": beat.pinned_blocks if beat else 0,
        "lost_reason": member.reason,
        **(beat.counts if beat else {}),
    }
