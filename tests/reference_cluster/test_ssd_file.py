"""Do blocks on SSD survive what happens to disks and processes, and is damage ever taken for KV?"""

from __future__ import annotations

import asyncio
import errno
import logging
import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from reference_cluster.errors import ConfigError
from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.kvpool.memory import BlockMemory, PoolBytes
from reference_cluster.kvpool.pool import BlockPool
from reference_cluster.kvpool.ssd_file import SECTOR, BufferedFile, DirectFile, FileTier, SsdFile

BLOCK_BYTES = 24


def content(key: int) -> bytes:
    """A block's bytes are a function of its key, as KV is."""
    return key.to_bytes(8, "little") * 3


def put(file: SsdFile, *keys: int) -> list[bool]:
    return [file.put(key, memoryview(content(key))) for key in keys]


def found(file: SsdFile, *keys: int) -> list[int]:
    """Which of the keys are read, each with its own bytes."""
    here = []
    for key in keys:
        buffer = bytearray(BLOCK_BYTES)
        if file.get(key, memoryview(buffer)):
            assert bytes(buffer) == content(key)
            here.append(key)
    return here


def opened(directory: Path, label: str = "a model", is_direct: bool = False) -> SsdFile:
    return SsdFile.open(directory, BLOCK_BYTES, label, is_direct)


def test_blocks_survive_a_restart(tmp_path: Path) -> None:
    """Without a goodbye: the first file is never closed. A dropped block does not come back."""
    before = opened(tmp_path)
    put(before, 1, 2, 3)
    before.drop(2)
    after = opened(tmp_path)
    assert found(after, 1, 2, 3) == [1, 3]
    assert list(after.entries) == [1, 3]
    after.check_integrity()


def test_bytes_of_something_else_are_not_taken_over(tmp_path: Path) -> None:
    """Another model, or blocks of another size: the file is begun anew."""
    put(opened(tmp_path), 1)
    assert found(opened(tmp_path, "another model"), 1) == []
    assert found(opened(tmp_path), 1) == []


def test_a_damaged_block_is_missing(tmp_path: Path) -> None:
    """One bit: it is counted once, gone, and can be put again."""
    file = opened(tmp_path)
    put(file, 1, 2)
    damaged = bytearray((tmp_path / "blocks").read_bytes())
    damaged[5] ^= 1
    (tmp_path / "blocks").write_bytes(damaged)
    assert found(file, 1, 2) == [2]
    assert found(file, 1) == []
    assert file.corrupted_blocks == 1
    put(file, 1)
    assert found(file, 1) == [1]
    file.check_integrity()


@pytest.mark.parametrize("cut", [1, 10, 20])
def test_a_torn_record_is_ignored(tmp_path: Path, cut: int) -> None:
    """The crash came while the last record was written; the next one is appended behind the
    others."""
    put(opened(tmp_path), 1, 2)
    index = tmp_path / "index"
    index.write_bytes(index.read_bytes()[:-cut])
    file = opened(tmp_path)
    assert found(file, 1, 2) == [1]
    put(file, 3)
    assert found(opened(tmp_path), 1, 2, 3) == [1, 3]


def test_a_record_whose_data_was_overwritten_is_found_out(tmp_path: Path) -> None:
    """2 takes the slot of 1, but the index of before the drop comes back."""
    file = opened(tmp_path)
    put(file, 1)
    old = (tmp_path / "index").read_bytes()
    file.drop(1)
    put(file, 2)
    (tmp_path / "index").write_bytes(old)
    again = opened(tmp_path)
    assert found(again, 1, 2) == []
    assert again.corrupted_blocks == 1


class FullDisk(BufferedFile):
    """Has room for so many writes."""

    def __init__(self, path: Path, room: int) -> None:
        super().__init__(path)
        self.room = room

    def write(self, offset: int, view: memoryview) -> None:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= 1
        super().write(offset, view)


def test_a_full_disk_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two blocks fit; they can be read still."""
    file = SsdFile(tmp_path, BLOCK_BYTES, "a model", FullDisk(tmp_path / "blocks", 2))
    with caplog.at_level(logging.WARNING):
        assert put(file, 1, 2, 3, 4) == [True, True, False, False]
    assert [one.getMessage() for one in caplog.records] == [
        f"{tmp_path}: No space left on device; takes no more blocks"
    ]
    assert found(file, 1, 2, 3) == [1, 2]
    file.check_integrity()


def test_a_directory_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    """With what to do about it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="name a directory for KV that can be written"):
        opened(tmp_path / "file")


def test_direct_writes_are_whole_sectors(tmp_path: Path) -> None:
    """A block of 24 bytes takes a sector; skipped where the file system has no direct I/O."""
    try:
        file = opened(tmp_path, is_direct=True)
    except ConfigError as error:
        pytest.skip(str(error))
    assert isinstance(file.data, DirectFile)
    put(file, 1, 2)
    assert (tmp_path / "blocks").stat().st_size == 2 * SECTOR
    assert found(file, 1, 2) == [1, 2]
    assert found(opened(tmp_path, is_direct=True), 1, 2) == [1, 2]


def test_the_log_does_not_grow_for_ever(tmp_path: Path) -> None:
    """5,000 blocks come and go; what stays is known after a restart."""
    file = opened(tmp_path)
    for key in range(5000):
        put(file, key)
        file.drop(key - 3)
    assert (tmp_path / "index").stat().st_size < 40_000
    assert found(opened(tmp_path), *range(4990, 5000)) == [4997, 4998, 4999]


KEYS = st.integers(0, 7)


class Disk(RuleBasedStateMachine):
    """Random calls, crashes and damage, against a set of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name)
        self.file = opened(self.path)
        self.keys: set[int] = set()
        self.is_torn = False  # Then blocks may be missing, or dropped ones back.

    @rule(key=KEYS)
    def put(self, key: int) -> None:
        assert put(self.file, key) == [True]
        self.keys.add(key)

    @rule(key=KEYS)
    def drop(self, key: int) -> None:
        self.file.drop(key)
        self.keys.discard(key)

    @rule()
    def crash(self) -> None:
        self.file.close()
        self.file = opened(self.path)

    @rule(cut=st.integers(1, 60))
    def tear(self, cut: int) -> None:
        self.file.close()
        index = self.path / "index"
        index.write_bytes(index.read_bytes()[:-cut])
        self.file = opened(self.path)
        self.is_torn = True

    @rule(at=st.integers(0, 7), byte=st.integers(0, 23))
    def damage(self, at: int, byte: int) -> None:
        blocks = self.path / "blocks"
        if blocks.exists() and len(data := bytearray(blocks.read_bytes())) > at * SECTOR + byte:
            data[at * SECTOR + byte] ^= 0x40
            blocks.write_bytes(data)
            self.is_torn = True

    @rule(key=KEYS)
    def get(self, key: int) -> None:
        here = found(self.file, key)
        assert self.is_torn or here == [key] * (key in self.keys)

    @invariant()
    def slots_balance(self) -> None:
        self.file.check_integrity()

    def teardown(self) -> None:
        self.file.close()
        self.directory.cleanup()


Disk.TestCase.settings = settings(derandomize=True, deadline=None, max_examples=60)
TestDisk = Disk.TestCase


# ---- the tier: what sinks and comes up, with its bytes ----------------------------------------


class Node:
    """DRAM for `dram` blocks, an SSD below it, and the index that follows both."""

    def __init__(self, directory: Path, dram: int, ssd: int, file: SsdFile | None = None) -> None:
        self.index = PrefixIndex(1)
        self.pool = BlockPool(dram, partial(self.index.stored, 0), partial(self.index.evicted, 0))
        self.file = file or opened(directory)
        self.tier = FileTier(self.pool, ssd, float(BLOCK_BYTES), 1e6, self.file)
        memory = BlockMemory(memoryview(bytearray(BLOCK_BYTES * (dram + 4))), 1, BLOCK_BYTES)
        self.kept = self.tier.kept = PoolBytes(memory, self.pool)
        self.tier.recover()

    async def compute(self, *keys: int) -> None:
        slots = self.kept.memory.take(len(keys))
        assert slots is not None
        for key, slot in zip(keys, slots, strict=True):
            self.kept.memory.view(slot)[:] = content(key)
        self.pool.unpin(keys[: self.kept.put(keys, slots)])
        self.kept.memory.give_back(slots)
        await self.settled()

    async def settled(self) -> None:
        """Whatever the disk was told is done."""
        for key in range(8):
            await self.tier.later(key, lambda key: True)
        await asyncio.sleep(0)

    async def bring_up(self, *keys: int) -> list[int]:
        """Hold them, wait for their reads, and see which have their bytes."""
        held, ready_s = self.tier.hold(keys, asyncio.get_running_loop().time())
        done = asyncio.Event()
        self.tier.when_read(keys[:held], ready_s, done.set)
        await done.wait()
        slots = self.kept.get(keys[: self.tier.intact(keys[:held])])
        here = list(keys[: len(slots)])
        for key, slot in zip(here, slots, strict=True):
            assert bytes(self.kept.memory.view(slot)) == content(key)
        self.kept.memory.give_back(slots)
        self.pool.unpin(keys[:held])
        await self.settled()
        return here

    def check(self) -> None:
        self.tier.check_integrity()
        self.kept.check_integrity()
        self.pool.check_integrity()
        self.file.check_integrity()


def test_what_dram_lets_go_comes_back_with_its_bytes(tmp_path: Path) -> None:
    """1 and 2 make room for 3 and 4, and these for 1 and 2."""

    async def main() -> None:
        node = Node(tmp_path, dram=2, ssd=4)
        await node.compute(1, 2)
        await node.compute(3, 4)
        assert sorted(node.file.entries) == [1, 2]
        assert await node.bring_up(1, 2) == [1, 2]
        assert sorted(node.file.entries) == [3, 4]
        assert node.index.match([1, 2]) == node.index.match([3, 4]) == [2]
        node.check()
        await node.tier.close()

    asyncio.run(main())


def test_a_tier_takes_over_what_the_last_process_left(tmp_path: Path) -> None:
    """And the index is told."""

    async def main() -> None:
        node = Node(tmp_path, dram=2, ssd=4)
        await node.compute(1, 2)
        await node.compute(3, 4)
        after = Node(tmp_path, dram=2, ssd=4)
        assert after.index.match([1, 2]) == [2]
        assert await after.bring_up(1, 2) == [1, 2]
        after.check()

    asyncio.run(main())


def test_a_damaged_block_is_computed_again(tmp_path: Path) -> None:
    """Of 1 and 2 the second is damaged: the first is reused, the second put anew."""

    async def main() -> None:
        node = Node(tmp_path, dram=2, ssd=4)
        await node.compute(1, 2)
        await node.compute(3, 4)
        (slot, _) = node.file.entries[2]
        node.file.data.write(slot * SECTOR, memoryview(b"damage"))
        assert await node.bring_up(1, 2) == [1]
        assert (node.tier.lost_blocks, node.file.corrupted_blocks) == (1, 1)
        await node.compute(1, 2)
        assert await node.bring_up(1, 2) == [1, 2]
        node.check()

    asyncio.run(main())


def test_a_full_disk_ends_the_tier_and_not_the_run(tmp_path: Path) -> None:
    """One block fits: the other one is gone, the index knows, and later ones go at once."""

    async def main() -> None:
        disk = FullDisk(tmp_path / "blocks", 1)
        node = Node(tmp_path, 2, 4, SsdFile(tmp_path, BLOCK_BYTES, "a model", disk))
        await node.compute(1, 2)
        await node.compute(3, 4)
        await node.compute(5, 6)
        assert len(node.file.entries) == len(node.tier.blocks.idle) == 1
        assert [node.index.match([key])[0] for key in (3, 4, 5, 6)] == [0, 0, 1, 1]
        node.check()

    asyncio.run(main())


def test_the_oldest_leave_the_file(tmp_path: Path) -> None:
    """Room for 2 of 4 that sink; file and tier agree, as do the slots."""

    async def main() -> None:
        node = Node(tmp_path, dram=2, ssd=2)
        for first in (1, 3, 5):
            await node.compute(first, first + 1)
        assert sorted(node.file.entries) == sorted(node.tier.blocks.idle) == [3, 4]
        assert node.index.match([1]) == [0]
        node.check()

    asyncio.run(main())
