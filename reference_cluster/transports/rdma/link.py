"""How do bytes reach one peer, over which devices, and what when one of them fails?"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from reference_cluster.transports.bytes import Endpoint, TransportError
from reference_cluster.transports.rdma import control
from reference_cluster.transports.rdma.verbs import (
    CHAINS_IN_FLIGHT,
    ActivePair,
    Chain,
    Nic,
    Operation,
    PathError,
)

# A path that failed so often in a row is left alone until so many seconds have passed: once with
# the queue pair it had, once with a new one.
TRIES = 2
RETRY_PATH_S = 5.0


@dataclass(slots=True, eq=False)
class Path:
    """One of our devices and one of the peer's, and the queue pair between them while it works."""

    nic: Nic
    port: control.Port
    rank: int
    pair: ActivePair | None = None
    pairing: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    failures: int = 0
    retry_at_s: float = 0.0
    fault: str = ""

    def __str__(self) -> str:
        return f"{self.nic.name}-{self.port.device}"


def paths_between(
    preferred: Sequence[Nic], secondary: Sequence[Nic], ports: Sequence[control.Port]
) -> list[Path]:
    """Every pair of devices, best first.

    Devices of one name, or else of one place in either list, are on one network in the usual
    cluster; others may not reach each other, so they come last.
    """
    nics = [*preferred, *secondary]
    names = {port.device for port in ports}
    paths = []
    for place, nic in enumerate(nics):
        for other, port in enumerate(ports):
            apart = port.device != nic.name if nic.name in names else other != place % len(ports)
            rank = 2 * apart + (place >= len(preferred))
            paths.append(Path(nic, port, rank))
    return sorted(paths, key=attrgetter("rank"))


class Link:
    """The way to one peer: a control connection, and the queue pairs that were made over it."""

    def __init__(self, peer: Endpoint, preferred: Sequence[Nic], secondary: Sequence[Nic]) -> None:
        self.peer = peer
        self.preferred = preferred
        self.secondary = secondary
        self.lock = asyncio.Lock()
        self.writer: asyncio.StreamWriter | None = None
        self.paths: list[Path] = []
        self.pairings = itertools.count(1)
        self.answers: dict[int, asyncio.Future[control.Party]] = {}
        self.users = 0
        self.end: TransportError | None = None

    @property
    def is_up(self) -> bool:
        return self.end is None

    async def move(self, operation: Operation, work: deque[Chain], settle_s: float) -> None:
        """Move all chains; as many lanes as the best paths can keep busy take from `work`."""
        self.users += 1
        try:
            await self.connect()
            best = [path for path in self.paths if path.rank == self.paths[0].rank]
            lanes = min(len(work), CHAINS_IN_FLIGHT * len(best))
            if lanes == 1:
                await self.lane(operation, work, settle_s)
                return
            try:
                async with asyncio.TaskGroup() as group:
                    for number in range(lanes):
                        lane = self.lane(operation, work, settle_s)
                        group.create_task(lane, name=f"rdma {operation.name} lane {number}")
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None  # The lanes fail for one and the same reason.
        finally:
            self.users -= 1

    async def lane(self, operation: Operation, work: deque[Chain], settle_s: float) -> None:
        """Move one chain after the other; what a failed path left undone goes by the next best."""
        while work:
            chain = work.popleft()
            path = self.best_path()
            path.users += 1
            pair = None
            try:
                pair = await self.pair_of(path)
                await pair.run(operation, chain, self.address, path.port.rkey, settle_s)
                path.failures = 0
            except PathError as error:
                work.appendleft(chain)
                self.failed(path, pair, str(error))
            except TransportError as error:
                raise TransportError(f"{self.peer.segment} by {path}: {error}") from None
            finally:
                path.users -= 1

    def best_path(self) -> Path:
        """The least failed, then best ranked, then least used path; TransportError without one."""
        if self.end is not None:
            raise self.end
        now_s = asyncio.get_running_loop().time()
        for path in self.paths:
            if path.failures and now_s >= path.retry_at_s:
                path.failures = 0
        path = min(self.paths, key=lambda path: (path.failures, path.rank, path.users))
        if path.failures >= TRIES:
            faults = ", ".join(f"{path}: {path.fault}" for path in self.paths)
            raise TransportError(f"{self.peer.segment}: no path is left ({faults})")
        return path

    def failed(self, path: Path, pair: ActivePair | None, fault: str) -> None:
        """Count it once a queue pair, however many chains it took with it."""
        if path.pair is not pair:
            return
        self.drop_pair(path, fault)
        path.failures += 1
        path.fault = fault
        path.retry_at_s = asyncio.get_running_loop().time() + RETRY_PATH_S

    def drop_pair(self, path: Path, fault: str) -> None:
        """Take the path's queue pair down, on the peer's side too."""
        if path.pair is not None:
            path.pair.close(fault)
            self.say(control.Unpair(path.pairing))
            path.pair = None

    async def pair_of(self, path: Path) -> ActivePair:
        """The path's queue pair, made now if it has none; PathError if that fails."""
        async with path.lock:
            if path.pair is not None and path.pair.fault is None:
                return path.pair
            self.drop_pair(path, "broken")
            path.pair = pair = ActivePair(path.nic)
            path.pairing = next(self.pairings)
            try:
                wish = control.Pairing(path.pairing, path.port.device, pair.end.party)
                pair.connect(await self.answer_to(wish))
            except BaseException as error:
                self.drop_pair(path, str(error))
                raise
            return pair

    async def answer_to(self, wish: control.Pairing) -> control.Party:
        """The peer's end for ours."""
        answer: asyncio.Future[control.Party] = asyncio.get_running_loop().create_future()
        self.answers[wish.number] = answer
        try:
            self.say(wish)
            return await answer
        finally:
            del self.answers[wish.number]

    def say(self, message: control.Message) -> None:
        if self.end is None and self.writer is not None:
            control.send(self.writer, message)

    async def connect(self) -> None:
        """Be let in by the peer, once."""
        async with self.lock:
            if self.end is not None:
                raise self.end
            if self.writer is not None:
                return
            host, _, port = self.peer.address.rpartition(":")
            try:
                reader, writer = await asyncio.open_connection(host, int(port))
            except OSError as error:
                reason = error.strerror or str(error)
                lost = f"{self.peer.address} does not listen: {reason}"
                raise self.close(lost, peer_is_gone=True) from None
            try:
                control.send(writer, control.Hello(control.VERSION, self.peer.key))
                answer = await control.receive(reader)
            except BaseException:
                writer.close()
                raise
            self.begin(reader, writer, answer)

    def begin(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answer: control.Message | None,
    ) -> None:
        """Take up what the peer says of itself, or raise what it says against us."""
        if not isinstance(answer, control.Welcome):
            writer.close()
            reason = answer.reason if isinstance(answer, control.Refused) else "no proper answer"
            raise self.close(f"{self.peer.address} refused {self.peer.segment}: {reason}")
        self.address = answer.address
        self.paths = paths_between(self.preferred, self.secondary, answer.ports)
        self.writer = writer
        self.listener = asyncio.create_task(self.listen(reader), name=f"rdma {self.peer.address}")

    async def listen(self, reader: asyncio.StreamReader) -> None:
        """Hear the peer's answers, and its end: a process that dies leaves its connections."""
        while message := await control.receive(reader):
            match message:
                case control.Paired(number, party) if self.is_awaited(number):
                    self.answers[number].set_result(party)
                case control.Refused(number, reason) if self.is_awaited(number):
                    self.answers[number].set_exception(PathError(reason))
        self.close(f"{self.peer.segment}: its process has gone", peer_is_gone=True)

    def is_awaited(self, number: int) -> bool:
        return number in self.answers and not self.answers[number].done()

    def close(self, reason: str, *, peer_is_gone: bool = False) -> TransportError:
        """Let everything go; transfers under way fail with this reason."""
        if self.end is not None:
            return self.end
        self.end = TransportError(reason, peer_is_gone=peer_is_gone)
        for path in self.paths:
            if path.pair is not None:
                path.pair.close(reason)
        for answer in self.answers.values():
            if not answer.done():
                answer.set_exception(PathError(reason))
        if self.writer is not None:
            self.listener.cancel()
            self.writer.close()
        return self.end
