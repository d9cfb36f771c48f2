"""Do messages arrive as they were sent, and does nonsense harm nobody?"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from reference_cluster import messages
from reference_cluster.messages import AnyMessage, Cancel, Checked, LetGo, Message, Sorry
from reference_cluster.peers import Peers
from reference_cluster.rpc import FRAME_BYTES_MAX, Line, NoAnswerError, Office, Questions

pytestmark = pytest.mark.timeout(20)
Got = list[tuple[bytes, Message]]


def talk(tmp_path: Path, script: Callable[[Office, Line, Got, Got], Awaitable[Any]]) -> Any:
    """Run a script with an office, a line to it, and what each of them has heard."""

    async def main() -> Any:
        at_office: Got = []
        at_line: Got = []
        address = f"ipc://{tmp_path}/office"
        office = Office(address, lambda who, what: at_office.append((who, what)))
        line = Line(address, b"worker.7", lambda who, what: at_line.append((who, what)))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one.run(), name="run") for one in (office, line)]
            try:
                return await script(office, line, at_office, at_line)
            finally:
                for task in tasks:
                    task.cancel()
                line.close()
                office.close()

    return asyncio.run(main())


async def until(is_so: Callable[[], object]) -> None:
    while not is_so():  # noqa: ASYNC110  # it changes by itself
        await asyncio.sleep(0.005)


def test_messages_come_in_order_with_who_sent_them(tmp_path: Path) -> None:
    """Both ways; those of one turn of the loop in one frame."""

    async def script(office: Office, line: Line, at_office: Got, at_line: Got) -> None:
        for number in range(100):
            line.tell(Cancel(number))
        await until(lambda: len(at_office) == 100)
        assert at_office == [(b"worker.7", Cancel(number)) for number in range(100)]
        office.post(b"worker.7", LetGo(1))
        office.post(b"nobody.0", LetGo(2))
        await until(lambda: at_line)
        assert at_line == [(b"", LetGo(1))]

    talk(tmp_path, script)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"nonsense",
        pickle.dumps([Cancel]),
        msgspec.msgpack.encode([["Unknown", 1]]),
        msgspec.msgpack.encode([["Cancel", "seven"]]),
        b"\x91" * (FRAME_BYTES_MAX + 1),
    ],
)
def test_nonsense_is_dropped_and_the_next_message_heard(tmp_path: Path, frame: bytes) -> None:
    """Nothing is unpickled, nothing larger than the limit is read."""

    async def script(office: Office, line: Line, at_office: Got, at_line: Got) -> None:
        line.send(b"", frame)
        await asyncio.sleep(0.05)
        for number in range(200):  # What is sent while the line connects again may get lost.
            line.tell(Cancel(number))
            await asyncio.sleep(0.01)
            if at_office:
                break
        assert at_office
        assert all(isinstance(message, Cancel) for _, message in at_office)

    talk(tmp_path, script)


def test_a_question_is_answered_refused_or_timed_out() -> None:
    """The answer itself; the reason; a deadline."""

    async def main() -> None:
        questions = Questions()
        answer = await questions.ask(lambda n: questions.answered(n, Checked(n, "fine")), 1.0, "x")
        assert answer.problem == "fine"
        with pytest.raises(NoAnswerError, match="decode-0: no room"):
            await questions.ask(
                lambda n: questions.answered(n, Sorry(n, "no room")), 1.0, "decode-0"
            )
        with pytest.raises(NoAnswerError, match=r"decode-0: no answer in 0\.01 s"):
            await questions.ask(lambda n: None, 0.01, "decode-0")
        questions.answered(99, Checked(99, "late"))
        assert not questions.open

    asyncio.run(main())


def test_nobody_waits_for_a_peer_that_has_gone(tmp_path: Path) -> None:
    """The question fails when the Conductor says so, long before its deadline."""

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            peers = Peers(b"prefill-0.1", group)
            with pytest.raises(NoAnswerError, match="no member"):
                await peers.ask("decode-0", LetGo, 60.0)
            there = messages.Peer("decode-0", 2, f"ipc://{tmp_path}/decode", None)
            assert peers.update(messages.Members([there])) == []
            asking = asyncio.ensure_future(peers.ask("decode-0", LetGo, 60.0))
            await asyncio.sleep(0.01)
            assert peers.update(messages.Members([])) == [there]
            with pytest.raises(NoAnswerError, match="has gone"):
                await asking

    asyncio.run(main())


def test_every_message_can_travel() -> None:
    """None was forgotten in the union that frames are decoded with."""
    kinds = [
        one
        for one in vars(messages).values()
        if isinstance(one, type) and issubclass(one, Message) and one is not Message
    ]
    assert set(kinds) == set(get_args(AnyMessage))
