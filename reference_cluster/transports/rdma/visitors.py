"""Whom does this process let at its memory? The passive side of every queue pair."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence

from reference_cluster.transports.rdma import control
from reference_cluster.transports.rdma.verbs import Nic, PassivePair, PathError

HELLO_S = 5.0
VISITORS_MAX = 1024
PAIRS_PER_VISITOR_MAX = 64


class Visitors:
    """Serves the control connections of peers who read and write our segment."""

    def __init__(self, key: bytes, nics: Sequence[Nic], address: int) -> None:
        self.key = key
        self.nics = {nic.name: nic for nic in nics}
        self.welcome = control.Welcome(address, [control.Port(nic.name, nic.rkey) for nic in nics])
        self.visits: dict[asyncio.StreamWriter, asyncio.Task[None] | None] = {}

    async def listen(self, address: str) -> str:
        """Open the door at `address`; the address and port that peers connect to."""
        self.server = await asyncio.start_server(self.visit, address, 0)
        host, port = self.server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One peer, from its Hello to the end of its connection."""
        self.visits[writer] = asyncio.current_task()
        pairs: dict[int, PassivePair] = {}
        try:
            refusal = await self.refusal(reader)
            if refusal is not None:
                control.send(writer, control.Refused(0, refusal))
                return
            control.send(writer, self.welcome)
            while message := await control.receive(reader):
                match message:
                    case control.Pairing():
                        control.send(writer, self.answer(pairs, message))
                    case control.Unpair(number) if number in pairs:
                        pairs.pop(number).close()
        finally:
            for pair in pairs.values():
                pair.close()
            writer.close()
            del self.visits[writer]

    async def refusal(self, reader: asyncio.StreamReader) -> str | None:
        """Why the visitor is not let in, if so."""
        try:
            async with asyncio.timeout(HELLO_S):
                hello = await control.receive(reader)
        except TimeoutError:
            return "no Hello came"
        if not isinstance(hello, control.Hello):
            return "a Hello comes first"
        if hello.version != control.VERSION:
            return f"version {hello.version} of its protocol is not ours, {control.VERSION}"
        if not hmac.compare_digest(hello.key, self.key):
            return "its key is wrong"
        if len(self.visits) > VISITORS_MAX:
            return f"{VISITORS_MAX} peers are connected already"
        return None

    def answer(
        self, pairs: dict[int, PassivePair], wish: control.Pairing
    ) -> control.Paired | control.Refused:
        nic = self.nics.get(wish.device)
        if nic is None:
            return control.Refused(wish.number, f"it has no device {wish.device!r}")
        if wish.number in pairs or len(pairs) >= PAIRS_PER_VISITOR_MAX:
            return control.Refused(wish.number, f"it has {len(pairs)} queue pairs for us already")
        try:
            pair = PassivePair(nic, wish.party)
        except PathError as error:
            return control.Refused(wish.number, str(error))
        pairs[wish.number] = pair
        return control.Paired(wish.number, pair.end.party)

    async def close(self) -> None:
        """Show everybody out."""
        self.server.close()
        visits = [task for task in self.visits.values() if task is not None]
        for task in visits:
            task.cancel()
        await asyncio.gather(*visits, return_exceptions=True)
        await self.server.wait_closed()
