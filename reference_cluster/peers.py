"""How does a worker talk with the other workers? A line to each that it asks something."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from reference_cluster.messages import Members, Message, Peer, Sorry
from reference_cluster.rpc import Line, NoAnswerError, Questions


class Peers:
    """The other members, as the Conductor tells of them."""

    def __init__(self, identity: bytes, group: asyncio.TaskGroup) -> None:
        self.identity = identity
        self.group = group
        self.members: dict[str, Peer] = {}
        self.lines: dict[str, tuple[Line, asyncio.Task[None]]] = {}
        self.questions = Questions()
        self.asked: dict[int, str] = {}  # Whom an open question went to.

    def update(self, members: Members) -> list[Peer]:
        """Take in who is there now; returns who has gone (or was replaced by a new process)."""
        now = {peer.name: peer for peer in members.peers}
        gone = [
            peer
            for name, peer in self.members.items()
            if name not in now or now[name].pid != peer.pid
        ]
        self.members = now
        for peer in gone:
            self.forget(peer.name)
        return gone

    def forget(self, name: str) -> None:
        """It answers no more: nobody should wait for it."""
        if name in self.lines:
            line, task = self.lines.pop(name)
            task.cancel()
            line.close()
        for number, asked in self.asked.items():
            if asked == name:
                self.questions.answered(number, Sorry(number, f"{name} has gone"))

    def is_member(self, identity: bytes) -> bool:
        name, _, pid = identity.decode().rpartition(".")
        return name in self.members and str(self.members[name].pid) == pid

    def tell(self, name: str, message: Message) -> None:
        """It may get lost: who has to know waits for an answer, with a deadline."""
        peer = self.members.get(name)
        if peer is None:
            return
        if name not in self.lines:
            line = Line(peer.address, self.identity, self.heard)
            task = self.group.create_task(line.run(), name=f"line to {name}")
            self.lines[name] = line, task
        self.lines[name][0].tell(message)

    async def ask(self, name: str, make: Callable[[int], Message], deadline_s: float) -> Any:
        """Ask one question; raises NoAnswerError in time, at once if the peer is no member."""
        if name not in self.members:
            raise NoAnswerError(f"{name}: no member")

        def put(number: int) -> None:
            self.asked[number] = name
            self.tell(name, make(number))

        return await self.questions.ask(put, deadline_s, name)

    def heard(self, _: bytes, message: Any) -> None:
        """An answer."""
        self.asked.pop(message.ask, None)
        self.questions.answered(message.ask, message)

    def close(self) -> None:
        for line, _ in self.lines.values():
            line.close()
