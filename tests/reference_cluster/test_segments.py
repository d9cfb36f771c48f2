"""Does shared memory live exactly as long as its owner, whatever happens to that?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from reference_cluster.transports.bytes import SHARED_MEMORY, Segment, TransportError, sweep

PREFIX = f"mcb-test{os.getpid()}-"
OWNER = f"""
import sys
from reference_cluster.transports.bytes import Segment
segment = Segment.create(4096, {PREFIX!r})
segment.buffer[:5] = b"hello"
print(segment.name, flush=True)
sys.stdin.read()
segment.close()
"""


@pytest.fixture
def owner() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that owns a segment until its standard input ends."""
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()
    sweep(PREFIX)


def test_another_process_maps_the_same_memory(owner: tuple[subprocess.Popen[str], str]) -> None:
    """What the owner wrote is read by whoever attaches, and only the user may."""
    segment = Segment.attach(owner[1])
    assert bytes(segment.buffer[:5]) == b"hello"
    assert segment.size == 4096
    assert (SHARED_MEMORY / segment.name).stat().st_mode & 0o777 == 0o600
    segment.close()


def test_a_living_owner_keeps_its_segment(owner: tuple[subprocess.Popen[str], str]) -> None:
    """A sweep beside a running cluster takes nothing away, nor does a close of who attached."""
    segment = Segment.attach(owner[1])
    assert segment.owner_is_alive()
    assert sweep(PREFIX) == []
    segment.close()
    assert (SHARED_MEMORY / owner[1]).exists()


def test_an_ordered_end_leaves_nothing(owner: tuple[subprocess.Popen[str], str]) -> None:
    """close() of the owner removes the name."""
    process, name = owner
    process.communicate()
    assert not (SHARED_MEMORY / name).exists()


def test_a_killed_owner_is_noticed_and_swept(owner: tuple[subprocess.Popen[str], str]) -> None:
    """Who attached before learns it from the segment; the name goes with the sweep."""
    process, name = owner
    segment = Segment.attach(name)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not segment.owner_is_alive()
    assert sweep(PREFIX) == [name]
    segment.close()
    with pytest.raises(TransportError, match="owner has gone") as caught:
        Segment.attach(name)
    assert caught.value.peer_is_gone


def test_views_outlive_the_segment() -> None:
    """A view that somebody still holds stays valid memory after close()."""
    segment = Segment.create(4096, PREFIX)
    view = segment.buffer[:4]
    segment.close()
    view[:] = b"safe"
    assert bytes(view) == b"safe"


def test_more_than_there_is_names_place_and_remedy() -> None:
    """Memory is reserved at the start, so a full /dev/shm is one line and not a crash later."""
    with pytest.raises(TransportError, match=r"^/dev/shm: no segment of .* pool smaller$"):
        Segment.create(1 << 50, PREFIX)
    assert not list(SHARED_MEMORY.glob(PREFIX + "*"))


@pytest.mark.parametrize("name", ["../etc/passwd", "mcb-none"])
def test_no_other_file_is_reached(name: str) -> None:
    """Names come from peers; one with a slash or of nothing is refused."""
    with pytest.raises(TransportError, match="segment"):
        Segment.attach(name)
