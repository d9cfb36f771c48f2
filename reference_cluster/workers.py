"""Where do a live cluster's workers meet the Conductor? At its office: membership and mirrors.

The counterpart of `inside.py` for instances in processes of their own. The kernel tells at once
when a worker has ended (a pidfd), heartbeats tell when one hangs; that one is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from reference_cluster.errors import ServeError
from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.membership import Member, Membership
from reference_cluster.messages import (
    VERSION,
    Beat,
    Check,
    Checked,
    Copied,
    Copy,
    Ended,
    Hello,
    Members,
    Message,
    Who,
)
from reference_cluster.parts import Parts
from reference_cluster.remote import RemoteColocated, RemoteDecode, RemotePrefill
from reference_cluster.request import Block, OnEnd, Request
from reference_cluster.rpc import NoAnswerError, Office, Questions

log = logging.getLogger(__name__)
CHECK_S_MAX = 5.0
SILENT_BEATS = 2.5  # Without so many heartbeats nobody new is sent to a worker.
UNDER_WAY_S_MAX = 2.0  # A message to a worker that answers is there after so long.
Mirror = RemotePrefill | RemoteDecode | RemoteColocated


def office_address(directory: str) -> str:
    return f"ipc://{Path(directory) / 'conductor'}"


class Links:
    """What the Conductor takes the workers' links for: as fast as they were found to be lately, or
    as configured while nothing has moved."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.sent: dict[int, float] = {}  # Bytes a second by node, in all that time.
        self.found: dict[int, float] = {}  # While it was sending.

    def report(self, node: int, sent_bytes: float, busy_s: float, in_s: float) -> None:
        """A worker has sent so much since its last report, and spent `busy_s` of the time on it."""
        self.sent[node] = sent_bytes / in_s
        if busy_s > 0.0:
            self.found[node] = sent_bytes / busy_s

    def available_bytes_per_s(self, source: int) -> float:
        return self.found.get(source, self.bytes_per_s)

    def sent_bytes_per_s(self, node: int) -> float:
        return self.sent.get(node, 0.0)


class Losing(Protocol):
    """Who is told of workers that go and come, and of requests that break."""

    def lose(self, name: str) -> None: ...

    def rejoin(self, name: str) -> None: ...

    def shun(self, name: str, is_shunned: bool) -> None: ...

    def broken(self, id: int, reason: str) -> None: ...


class Workers:
    """All workers of the cluster, as the Conductor reaches them."""

    def __init__(
        self, parts: Parts, index: PrefixIndex, on_end: OnEnd, directory: str, cluster: Losing
    ) -> None:
        self.parts = parts
        self.index = index
        self.on_end = on_end
        self.cluster = cluster
        self.config = parts.config.workers
        self.loop = asyncio.get_running_loop()
        self.office = Office(office_address(directory), self.receive)
        self.membership = Membership(parts.config.instance_names)
        self.mirrors: dict[str, Mirror] = {}
        self.questions = Questions()
        link = parts.config.network.link_bytes_per_s or parts.profile.link_bytes_per_s
        self.transport = Links(link)
        self.all_here = asyncio.Event()
        self.exits: dict[str, int] = {}  # A pidfd of each member.
        self.directory = Path(directory)
        self.begun_s = self.loop.time()
        self.copies: dict[int, asyncio.Task[None]] = {}

    # ---- making the mirrors ------------------------------------------------------------------

    def prefill(self, id: int) -> RemotePrefill:
        name = f"prefill-{id}"
        made = RemotePrefill(id, self.parts, self.index, partial(self.tell, name), self.prefilled)
        self.mirrors[name] = made
        return made

    def prefilled(self, request: Request) -> None:
        """A request for one token is done with its prefill: nobody has to expect it any more."""
        assert request.decode is not None
        decode = self.mirrors[request.decode]
        assert isinstance(decode, RemoteDecode)
        decode.forget(request)
        self.on_end(request)

    def decode(self, id: int) -> RemoteDecode:
        name = f"decode-{id}"
        self.mirrors[name] = made = RemoteDecode(
            id, self.parts, partial(self.tell, name), self.on_end
        )
        return made

    def colocated(self, id: int) -> RemoteColocated:
        name = f"colocated-{id}"
        made = RemoteColocated(id, self.parts, self.index, partial(self.tell, name), self.on_end)
        self.mirrors[name] = made
        return made

    def make(self, name: str) -> Mirror:
        """A new mirror in this place."""
        role, id = name.rsplit("-", 1)
        of_role: dict[str, Callable[[int], Mirror]] = {
            "prefill": self.prefill,
            "decode": self.decode,
            "colocated": self.colocated,
        }
        return of_role[role](int(id))

    def drop(self, name: str, now_s: float) -> None:
        """What its batch had produced, as far as we were told, is in its requests."""
        mirror = self.mirrors[name]
        if not isinstance(mirror, RemotePrefill):
            for request in [one.request for one in mirror.batch.members.values()]:
                mirror.batch.remove(request)

    def begin(self, name: str) -> None:
        """The worker has begun already."""

    # ---- talking with the workers ------------------------------------------------------------

    def start(self, group: asyncio.TaskGroup) -> None:
        group.create_task(self.office.run(), name="office")
        group.create_task(self.watch(), name="membership")

    async def ready(self) -> None:
        """Return when every worker has said hello; raises ServeError naming who has not."""
        try:
            async with asyncio.timeout(self.config.start_s_max):
                await self.all_here.wait()
        except TimeoutError:
            missing = ", ".join(self.membership.missing)
            raise ServeError(
                f"{missing}: no hello in {self.config.start_s_max:g} s; see the worker's own log"
            ) from None

    def tell(self, name: str, message: Message) -> None:
        member = self.membership.members[name]
        if member.state == "member":
            self.office.post(member.identity, message)

    def receive(self, identity: bytes, message: Message) -> None:
        if isinstance(message, Hello):
            self.hello(identity, message)
            return
        member = self.membership.by_identity.get(identity)
        if member is None:
            if isinstance(message, Beat):  # Of somebody before our time, or taken for dead.
                self.office.post(identity, Who(os.getpid()))
            return
        member.seen_s = self.loop.time()
        if member.is_silent:
            member.is_silent = False
            self.cluster.shun(member.name, False)
        if isinstance(message, Beat):
            self.beat(member, message)
        if isinstance(message, Checked | Copied):
            self.questions.answered(message.ask, message)
        elif isinstance(message, Ended) and message.status == "failed" and message.is_retried:
            self.cluster.broken(message.id, message.reason)
        else:
            self.mirrors[member.name].receive(message)

    def beat(self, member: Member, beat: Beat) -> None:
        before, member.beat = member.beat, beat
        mirror = self.mirrors[member.name]
        if isinstance(mirror, RemotePrefill) and before is not None and beat.at_s > before.at_s:
            sent, busy_s = (
                beat.counts.get(name, 0.0) - before.counts.get(name, 0.0)
                for name in ("sent_bytes", "stream_busy_s")
            )
            self.transport.report(mirror.id, sent, busy_s, beat.at_s - before.at_s)
        # Whatever the mirror has and the worker has not was lost on the way.
        known = frozenset(beat.requests)
        for request in mirror.owned:
            placed_s = request.timeline.placed_s or beat.at_s
            if request.id not in known and beat.at_s - placed_s > UNDER_WAY_S_MAX:
                self.cluster.broken(request.id, "lost-track")

    # ---- membership --------------------------------------------------------------------------

    def hello(self, identity: bytes, hello: Hello) -> None:
        """A worker has started, or is known to no Conductor before this one."""
        if hello.version != VERSION or hello.name not in self.membership.members:
            log.error("%r, version %d, is no worker of this cluster", hello.name, hello.version)
            return
        if identity in self.membership.by_identity:
            return  # It was asked twice who it is.
        if self.membership.members[hello.name].state == "member":
            self.lose(hello.name, "another process took its place")
        if sys.platform == "linux":
            try:
                descriptor = os.pidfd_open(hello.pid)
            except ProcessLookupError:
                return  # It has ended since.
            self.exits[hello.name] = descriptor
            self.loop.add_reader(descriptor, self.lose, hello.name, "its process has ended")
        self.membership.enter(identity, hello, self.loop.time())
        self.tell_members()
        self.cluster.rejoin(hello.name)
        if not self.membership.missing:
            self.all_here.set()

    def lose(self, name: str, reason: str) -> None:
        """A worker has ended or is taken for dead."""
        log.warning("%s is lost: %s", name, reason)
        if name in self.exits:
            descriptor = self.exits.pop(name)
            self.loop.remove_reader(descriptor)
            os.close(descriptor)
        identity = self.membership.members[name].identity.decode()
        (self.directory / identity).unlink(missing_ok=True)  # It will not be taken for a stranger.
        self.membership.leave(name, reason)
        self.tell_members()
        self.cluster.lose(name)

    def tell_members(self) -> None:
        members = Members(self.membership.peers())
        for identity in self.membership.by_identity:
            self.office.post(identity, members)

    async def watch(self) -> None:
        """Kill who has not been heard of for too long; unless it was us who did not listen."""
        pace_s = self.config.heartbeat_s / 2
        try:
            while True:
                due_s = self.loop.time() + pace_s
                await asyncio.sleep(pace_s)
                now_s = self.loop.time()
                if now_s - due_s > pace_s:
                    continue
                for member in self.membership.silent(now_s, SILENT_BEATS * 2 * pace_s):
                    member.is_silent = True
                    self.cluster.shun(member.name, True)
                for member in self.membership.silent(now_s, self.config.dead_after_s):
                    self.kill(member)
                if self.membership.missing:
                    self.kill_strangers()
        finally:
            for name in list(self.exits):
                self.loop.remove_reader(self.exits[name])
                os.close(self.exits.pop(name))
            self.office.close()

    def kill_strangers(self) -> None:
        """Workers that hang since before our time never say hello: known by their sockets."""
        if self.loop.time() - self.begun_s < self.config.dead_after_s:
            return
        for name in self.membership.missing:
            for path in sorted(self.directory.glob(f"{name}.*")):
                age_s = time.time() - path.stat().st_mtime
                command = Path("/proc", path.suffix[1:], "cmdline")
                if age_s > self.config.dead_after_s and command.exists():
                    if f"--name\0{name}\0".encode() in command.read_bytes():
                        log.warning("%s never said hello: killed", path.name)
                        os.kill(int(path.suffix[1:]), signal.SIGKILL)
                    path.unlink()

    def kill(self, member: Member) -> None:
        """First, so that it can never write to anybody's memory again; then it is lost."""
        assert member.hello is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(member.hello.pid, signal.SIGKILL)
        self.lose(member.name, f"no sign of life for {self.config.dead_after_s:g} s")

    # ---- what the cluster asks of them -------------------------------------------------------

    def copy(
        self, holder: int, target: int, blocks: Sequence[Block], done: Callable[[int], None]
    ) -> None:
        """Keep the holder's blocks at the target too, as long as they are used; tells how many."""
        name = f"prefill-{target}"
        if self.membership.members[name].state != "member":
            done(0)
            return

        async def asking() -> None:
            copied = 0
            with contextlib.suppress(NoAnswerError):
                keys: Any = tuple(blocks)
                answer = await self.questions.ask(
                    lambda ask: self.tell(name, Copy(ask, f"prefill-{holder}", keys)),
                    2 * self.parts.config.failure.transfer_deadline_s,
                    f"{name} copies",
                )
                copied = answer.blocks
            done(copied)

        task = self.loop.create_task(asking(), name=f"copy to {name}")
        self.copies[id(task)] = task
        task.add_done_callback(lambda _: self.copies.pop(id(task)))

    async def check(self) -> dict[str, str]:
        """What every member's `check_integrity` says: one line each, empty where all is well."""
        found = {}
        for name in [peer.name for peer in self.membership.peers()]:
            try:
                answer = await self.questions.ask(partial(self.check_one, name), CHECK_S_MAX, name)
                found[name] = answer.problem
            except NoAnswerError as error:
                found[name] = str(error)
        return found

    def check_one(self, name: str, ask: int) -> None:
        self.tell(name, Check(ask))

    def rows(self) -> list[dict[str, Any]]:
        return self.membership.rows(self.loop.time())

    @property
    def engine_lag_s(self) -> float:
        """How late an engine woke at worst, by the last heartbeats."""
        beats = [one.beat for one in self.membership.members.values() if one.beat]
        return max((beat.lag_s_max for beat in beats), default=0.0)

    def check_integrity(self, is_idle: bool) -> None:
        """The workers look after their own books (`check`)."""
