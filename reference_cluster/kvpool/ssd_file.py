"""Where are blocks that DRAM has let go, for real? In a file, whose index survives a crash."""

from __future__ import annotations

import asyncio
import errno
import logging
import mmap
import os
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol
from zlib import crc32

from reference_cluster.errors import ConfigError
from reference_cluster.kvpool.memory import PoolBytes
from reference_cluster.kvpool.pool import BlockPool
from reference_cluster.kvpool.ssd import SsdTier
from reference_cluster.request import Block

SECTOR = 4096  # What O_DIRECT wants offsets and sizes to be multiples of.
THREADS = 4
HEADER = struct.Struct("<8sIQI")  # Magic, label, block bytes, checksum of these.
RECORD = struct.Struct("<QIIBI")  # Key, slot, checksum of the data, kind, checksum of these.
MAGIC = b"mcbssd01"
STORED, DROPPED = 0, 1

log = logging.getLogger(__name__)


class Data(Protocol):
    """The bytes of all slots."""

    def write(self, offset: int, view: memoryview) -> None: ...
    def read(self, offset: int, view: memoryview) -> None: ...
    def close(self) -> None: ...


class BufferedFile:
    """Through the page cache."""

    def __init__(self, path: Path, flags: int = 0) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)

    def write(self, offset: int, view: memoryview) -> None:
        written = 0
        while written < len(view):
            written += os.pwrite(self.descriptor, view[written:], offset + written)

    def read(self, offset: int, view: memoryview) -> None:
        """What lies beyond the end of the file stays as it was: a checksum tells."""
        got = 0
        while got < len(view):
            count = os.preadv(self.descriptor, [view[got:]], offset + got)
            if not count:
                return
            got += count

    def close(self) -> None:
        os.close(self.descriptor)


class DirectFile(BufferedFile):
    """Past the page cache (O_DIRECT), by way of an aligned buffer of each thread."""

    def __init__(self, path: Path, block_bytes: int) -> None:
        try:
            super().__init__(path, os.O_DIRECT)
        except OSError as error:
            reason = f"no direct I/O here ({error.strerror}); set pool.direct_io = false"
            raise ConfigError(f"{path}: {reason}") from None
        self.size = slot_bytes(block_bytes)
        self.local = threading.local()

    def buffer(self) -> memoryview:
        if not hasattr(self.local, "buffer"):
            self.local.buffer = memoryview(mmap.mmap(-1, self.size))
        buffer: memoryview = self.local.buffer
        return buffer

    def write(self, offset: int, view: memoryview) -> None:
        buffer = self.buffer()
        buffer[: len(view)] = view
        super().write(offset, buffer)

    def read(self, offset: int, view: memoryview) -> None:
        buffer = self.buffer()
        super().read(offset, buffer)
        view[:] = buffer[: len(view)]


def slot_bytes(block_bytes: int) -> int:
    return -(-block_bytes // SECTOR) * SECTOR


class SsdFile:
    """Blocks of one size by 64-bit keys, in the slots of one file that grows as it must.

    The index is a log of records, each with its checksum, that are appended when a block's data is
    written. After a crash the log is read up to its first torn record. Nothing is synced: a record
    whose data did not get to the disk is found out by the data's checksum when the block is read,
    as is any other damage, and the block is then missing. `label` names what the bytes mean (model,
    layout): a file with another label or block size is begun anew.

    All calls may wait for the disk; they may come from any thread, for one key from one at a time.
    """

    def __init__(
        self, directory: Path, block_bytes: int, label: str, data: Data | None = None
    ) -> None:
        self.block_bytes = block_bytes
        self.slot_bytes = slot_bytes(block_bytes)
        self.data = data or BufferedFile(directory / "blocks")
        self.path = directory / "index"
        self.header = header(label, block_bytes)
        self.entries: dict[int, tuple[int, int]] = {}  # Key -> slot, checksum.
        self.lock = threading.Lock()
        self.is_full = False  # The disk: no block is taken any more.
        self.corrupted_blocks = 0
        self.index = -1
        self.recover()
        used = {slot for slot, _ in self.entries.values()}
        self.slots = max(used, default=-1) + 1
        self.idle = [slot for slot in range(self.slots) if slot not in used]

    @classmethod
    def open(
        cls, directory: Path, block_bytes: int, label: str, is_direct: bool = False
    ) -> SsdFile:
        """Make the directory, or go on with what is there; raises ConfigError."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            data = DirectFile(directory / "blocks", block_bytes) if is_direct else None
            return cls(directory, block_bytes, label, data)
        except OSError as error:
            reason = f"{error.strerror}; name a directory for KV that can be written"
            raise ConfigError(f"pool.ssd_directory {directory}: {reason}") from None

    def recover(self) -> None:
        """Read the log as far as it is whole, and write it anew without what is outdated."""
        owners: dict[int, int] = {}  # Slot -> the last key that was written there.
        for key, slot, checksum, kind in records(self.path, self.header):
            if kind == STORED:
                self.entries.pop(owners.get(slot, -1), None)
                self.entries.pop(key, None)  # So that the dict is in the order of writing.
                self.entries[key] = slot, checksum
                owners[slot] = key
            elif key in self.entries:
                del self.entries[key]
        self.compact()

    def compact(self) -> None:
        """Begin the log anew, with one record for each block."""
        fresh = self.path.with_suffix(".new")
        lines = [record(key, slot, crc, STORED) for key, (slot, crc) in self.entries.items()]
        fresh.write_bytes(self.header + b"".join(lines))
        fresh.replace(self.path)
        if self.index >= 0:
            os.close(self.index)
        self.index = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self.logged = len(lines)

    def put(self, key: int, view: memoryview) -> bool:
        """Write a block; False where the disk has no room for it, now and from now on."""
        with self.lock:
            if self.is_full:
                return False
            if not self.idle:
                self.idle.append(self.slots)
                self.slots += 1
            slot = self.idle.pop()
        checksum = crc32(view)
        try:
            self.data.write(slot * self.slot_bytes, view)
            self.drop(key)
            with self.lock:
                self.append(key, slot, checksum, STORED)
                self.entries[key] = slot, checksum
        except OSError as error:
            with self.lock:
                self.idle.append(slot)
                self.give_up(error)
            return False
        return True

    def append(self, key: int, slot: int, checksum: int, kind: int) -> None:
        if self.logged > 1024 + 4 * len(self.entries):
            self.compact()
        line = record(key, slot, checksum, kind)
        written = os.write(self.index, line)
        if written < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.logged += 1

    def give_up(self, error: OSError) -> None:
        """Take no more blocks; said once. What is there can be read still."""
        if not self.is_full:
            self.is_full = True
            log.warning("%s: %s; takes no more blocks", self.path.parent, error.strerror)

    def get(self, key: int, view: memoryview) -> bool:
        """Read a block; False where it is missing or damaged (and then gone)."""
        with self.lock:
            if key not in self.entries:
                return False
            slot, checksum = self.entries[key]
        with suppress(OSError):  # A bad sector is damage like any other: the checksum tells.
            self.data.read(slot * self.slot_bytes, view)
        if crc32(view) == checksum:
            return True
        self.corrupted_blocks += 1
        self.drop(key)
        return False

    def drop(self, key: int) -> None:
        """Forget a block, if it is here."""
        with self.lock:
            if key in self.entries:
                slot, checksum = self.entries.pop(key)
                self.idle.append(slot)
                with suppress(OSError):  # Unrecorded it comes back after a crash: it is not wrong.
                    self.append(key, slot, checksum, DROPPED)

    def close(self) -> None:
        self.data.close()
        os.close(self.index)

    def check_integrity(self) -> None:
        """Raise AssertionError where slots are lost or given twice."""
        slots = [slot for slot, _ in self.entries.values()] + self.idle
        assert len(slots) == len(frozenset(slots)), "a slot of the SSD file is given twice"
        assert len(slots) == self.slots, f"{len(slots)} used and free != {self.slots}"


def header(label: str, block_bytes: int) -> bytes:
    fields = MAGIC, crc32(label.encode()), block_bytes
    return HEADER.pack(*fields, crc32(repr(fields).encode()))


def record(key: int, slot: int, checksum: int, kind: int) -> bytes:
    body = RECORD.pack(key, slot, checksum, kind, 0)[:-4]
    return body + crc32(body).to_bytes(4, "little")


def records(path: Path, expected: bytes) -> list[tuple[int, int, int, int]]:
    """Key, slot, checksum and kind of all whole records; none of a file of something else."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    if content[: len(expected)] != expected:
        return []
    found = []
    for start in range(len(expected), len(content) - RECORD.size + 1, RECORD.size):
        line = content[start : start + RECORD.size]
        key, slot, checksum, kind, own = RECORD.unpack(line)
        if crc32(line[:-4]) != own:
            break
        found.append((key, slot, checksum, kind))
    return found


Call = Callable[..., bool | None]


class FileTier(SsdTier):
    """The SSD tier with real bytes: `SsdTier` decides what sinks and comes up, the file has it.

    Every key keeps to one thread, so that what happens to a block happens in the order in which it
    was decided. A block that cannot be written, or has no bytes, leaves the tier; one that cannot
    be read stays in DRAM without bytes (`PoolBytes.unfilled`) until it is computed.
    """

    def __init__(
        self,
        dram: BlockPool,
        capacity: int,
        block_bytes: float,
        bytes_per_s: float,
        file: SsdFile,
    ) -> None:
        super().__init__(dram, capacity, block_bytes, bytes_per_s)
        self.file = file
        self.kept: PoolBytes  # Made after this, as it listens to the same pool; set by its maker.
        self.on_gone = self.blocks.on_evicted
        self.blocks.on_evicted = self.let_go
        self.loop = asyncio.get_running_loop()
        self.threads = [ThreadPoolExecutor(1, f"ssd-{number}") for number in range(THREADS)]
        self.written: dict[Block, None] = {}  # In the file, or on their way there.
        self.reading: dict[Block, asyncio.Future[bool]] = {}
        self.lost_blocks = 0  # Could not be written or read.

    def recover(self) -> None:
        """Take over what the file has from before, the oldest first."""
        for key in list(self.file.entries):
            self.written[key] = None
            super().sink((key,))
            self.on_stored((key,))

    def later(self, block: Block, call: Call, *arguments: memoryview) -> asyncio.Future[bool]:
        """Run a call of the file on the block's thread."""
        assert isinstance(block, int), "keys of blocks on SSD are 64-bit integers"
        thread = self.threads[block % THREADS]
        return self.loop.run_in_executor(thread, lambda: bool(call(block, *arguments)))

    def sink(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            if block in self.written:
                super().sink((block,))  # It was to come up, but DRAM has no room for it.
            elif self.file.is_full or not self.kept.filled((block,)):
                self.on_gone((block,))
            else:
                super().sink((block,))
                self.write(block)

    def write(self, block: Block) -> None:
        slots = self.kept.get((block,))
        self.written[block] = None
        writing = self.later(block, self.file.put, self.kept.memory.view(slots[0]))

        def done(_: object) -> None:
            self.kept.memory.give_back(slots)
            if not writing.result() and block in self.written:
                del self.written[block]
                self.lost_blocks += 1
                if block in self.blocks:
                    self.blocks.discard(block)
                    self.on_gone((block,))

        writing.add_done_callback(done)

    def let_go(self, blocks: Sequence[Block]) -> None:
        """The tier has no room for them any more."""
        self.erase(blocks)
        self.on_gone(blocks)

    def erase(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            if block in self.written:
                del self.written[block]
                self.later(block, self.file.drop)

    def came(self, blocks: Sequence[Block]) -> None:
        self.erase([block for block in blocks if block in self.blocks])  # Computed anew.
        super().came(blocks)

    def read(self, blocks: Sequence[Block], now_s: float) -> None:
        super().read(blocks, now_s)
        for block in blocks:
            slot = self.kept.slots.get(block)
            if slot is None:
                self.lost_blocks += 1
            else:
                self.read_into(block, slot)
            self.erase((block,))

    def read_into(self, block: Block, slot: int) -> None:
        memory = self.kept.memory
        memory.hold((slot,))
        reading = self.later(block, self.file.get, memory.view(slot))
        self.reading[block] = reading

        def done(_: object) -> None:
            if reading.result():
                self.kept.fill(block, slot)
            else:
                self.lost_blocks += 1
            memory.give_back((slot,))
            if self.reading.get(block) is reading:
                del self.reading[block]

        reading.add_done_callback(done)

    def ready_s(self, blocks: Sequence[Block], now_s: float) -> float:
        ready_s = super().ready_s(blocks, now_s)
        if ready_s <= now_s and any(block in self.reading for block in blocks):
            return now_s + self.block_s  # Slower than predicted.
        return ready_s

    def arrived(self, blocks: Sequence[Block], now_s: float) -> int:
        self.settle(now_s)
        return self.kept.filled(blocks)

    def are_awaited(self, blocks: Sequence[Block], ready_s: float, now_s: float) -> bool:
        return any(block in self.reading for block in blocks)

    def intact(self, blocks: Sequence[Block]) -> int:
        return self.kept.filled(blocks)

    def when_read(self, blocks: Sequence[Block], ready_s: float, call: Callable[[], None]) -> None:
        awaited = [self.reading[block] for block in blocks if block in self.reading]
        # Its own callback runs after those of the reads, which were there first.
        asyncio.gather(*awaited).add_done_callback(lambda _: call())

    async def close(self) -> None:
        """Wait for what is being written and read."""
        for thread in self.threads:
            await self.loop.run_in_executor(None, thread.shutdown)
        self.file.close()
