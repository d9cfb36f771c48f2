"""What does a worker say to its Conductor? A real worker process, and an office that we keep."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from reference_cluster.launch.process import write_cluster
from reference_cluster.messages import (
    VERSION,
    Beat,
    BlockEvent,
    Cancel,
    Check,
    Checked,
    Hello,
    Members,
    Message,
    Prefilled,
    Resend,
    Serve,
    Started,
    Who,
    Work,
)
from reference_cluster.policies.scheduling import Placement
from reference_cluster.rpc import Office
from tests.reference_cluster.live import FAST
from tests.reference_cluster.small import a_config

pytestmark = [pytest.mark.live, pytest.mark.timeout(30)]
REPO = Path(__file__).resolve().parents[2]


class Desk:
    """Hears a worker, and speaks to it."""

    def __init__(self, directory: Path) -> None:
        self.office = Office(f"ipc://{directory}/conductor", self.receive)
        self.heard: list[Message] = []
        self.identity = b""

    def receive(self, identity: bytes, message: Message) -> None:
        self.identity = identity
        self.heard.append(message)

    def tell(self, message: Message) -> None:
        self.office.post(self.identity, message)

    async def next(self, kind: type[Message]) -> Any:
        """The next message of this kind; those before it are forgotten."""
        while True:
            for place, message in enumerate(self.heard):
                if isinstance(message, kind):
                    del self.heard[: place + 1]
                    return message
            await asyncio.sleep(0.005)


def with_worker(
    name: str, directory: Path, script: Callable[[Desk, subprocess.Popen[bytes]], Awaitable[None]]
) -> None:
    config = a_config(workers={"placement": "processes", "heartbeat_s": 0.1})
    write_cluster(str(directory), config, FAST)
    command = [sys.executable, "-m", "reference_cluster.worker", "--name", name]
    command += ["--directory", str(directory), "--parent", str(os.getpid())]

    async def main() -> None:
        desk = Desk(directory)
        hearing = asyncio.create_task(desk.office.run(), name="office")
        with subprocess.Popen(command, cwd=REPO) as worker:  # noqa: ASYNC220  # at once
            try:
                async with asyncio.timeout(20.0):
                    await script(desk, worker)
            finally:
                worker.kill()
                hearing.cancel()
                desk.office.close()

    asyncio.run(main())


def a_serve(id: int, input_tokens: int = 40) -> Serve:
    blocks = tuple(range(id * 100, id * 100 + -(-input_tokens // 10)))
    work = Work(id, input_tokens, 1, blocks, 0.0, 0.0, "prefill-0", "decode-0")
    return Serve(work, Placement(0, 0, 0.0, 0.0, 0))


def test_it_says_hello_works_and_tells_what_its_pool_holds(tmp_path: Path) -> None:
    """Hello first, contents, heartbeats; a prompt's blocks as numbered events without a gap."""

    async def script(desk: Desk, worker: subprocess.Popen[bytes]) -> None:
        hello = await desk.next(Hello)
        assert (hello.version, hello.name, hello.pid) == (VERSION, "prefill-0", worker.pid)
        assert desk.identity == f"prefill-0.{worker.pid}".encode()
        cleared, empty = await desk.next(BlockEvent), await desk.next(BlockEvent)
        assert (cleared.event_type, empty.event_type) == ("cleared", "stored")
        await desk.next(Beat)
        desk.tell(a_serve(7))
        assert (await desk.next(Started)).id == 7
        stored = await desk.next(BlockEvent)
        assert (stored.event_type, stored.seq_hashes) == ("stored", (700, 701, 702, 703))
        assert [cleared.event_id, empty.event_id, stored.event_id] == [0, 1, 2]
        done = await desk.next(Prefilled)
        assert done.stamps.prefilled_tokens == 40
        desk.tell(Check(5))
        assert await desk.next(Checked) == Checked(5, "")

    with_worker("prefill-0", tmp_path, script)


def test_contents_are_sent_again_when_asked_for(tmp_path: Path) -> None:
    """After a gap in the events, or by a Conductor that has just started."""

    async def script(desk: Desk, worker: subprocess.Popen[bytes]) -> None:
        await desk.next(Hello)
        desk.tell(a_serve(1))
        await desk.next(Prefilled)
        for question in (Resend(), Who(4711)):
            desk.tell(question)
            if isinstance(question, Who):
                await desk.next(Hello)
            assert (await desk.next(BlockEvent)).event_type == "cleared"
            assert sorted((await desk.next(BlockEvent)).seq_hashes) == [100, 101, 102, 103]

    with_worker("prefill-0", tmp_path, script)


def test_a_new_conductor_finds_no_requests_of_the_old(tmp_path: Path) -> None:
    """Nobody waits for them any more."""

    async def script(desk: Desk, worker: subprocess.Popen[bytes]) -> None:
        await desk.next(Hello)
        for id in range(200):
            desk.tell(a_serve(id, 90))
        await desk.next(Started)
        desk.tell(Who(4711))
        await desk.next(Hello)
        while (await desk.next(Beat)).requests:
            pass
        desk.tell(Cancel(3))  # Of what it does not know any more: nothing happens.
        desk.tell(Check(1))
        assert (await desk.next(Checked)).problem == ""

    with_worker("prefill-0", tmp_path, script)


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_it_ends_when_asked_to(tmp_path: Path, name: str) -> None:
    """SIGTERM: exit code 0, its socket gone or not in anybody's way."""

    async def script(desk: Desk, worker: subprocess.Popen[bytes]) -> None:
        await desk.next(Hello)
        desk.tell(Members([]))
        worker.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.wait, 10.0) == 0

    with_worker(name, tmp_path, script)
