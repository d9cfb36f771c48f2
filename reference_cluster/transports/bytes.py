"""What must whoever moves real KV bytes between processes be able to do, and over what memory?"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from reference_cluster.errors import ClusterError

SHARED_MEMORY = Path("/dev/shm")


class TransportError(ClusterError, RuntimeError):
    """A transfer that did not happen, in one line; `peer_is_gone` says whether a retry can help."""

    def __init__(self, message: str, *, peer_is_gone: bool = False) -> None:
        super().__init__(message)
        self.peer_is_gone = peer_is_gone


class Range(msgspec.Struct, frozen=True):
    """`length` bytes of a registered segment, from `offset` on."""

    offset: int
    length: int


class Endpoint(msgspec.Struct, frozen=True):
    """All that a peer needs to reach one segment; it travels by the control plane.

    `key` names one incarnation of the segment: an endpoint of a process that was started again
    does not reach its successor's memory.
    """

    transport: str
    address: str
    segment: str
    size: int
    key: bytes = b""


class Segment:
    """Named shared memory of one process, which others on this host can map too (mode 0600).

    Its owner holds a lock on it for life, so anyone can tell whether the owner still lives; a
    fork of the owner would share that lock, so start processes by spawn. The memory is reserved
    when it is made: a full /dev/shm is an error then, not a SIGBUS later.
    """

    def __init__(self, name: str, descriptor: int, size: int, is_owner: bool) -> None:
        self.name = name
        self.descriptor = descriptor
        self.size = size
        self.is_owner = is_owner
        # Numbers are not used again soon, so a number names one incarnation of the name.
        self.incarnation = os.fstat(descriptor).st_ino
        self._map = mmap.mmap(descriptor, size)
        self.buffer = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @classmethod
    def create(cls, size: int, prefix: str = "mcb-") -> Segment:
        """New zeroed memory of `size` bytes, under a name that begins with `prefix`."""
        assert size > 0
        name = prefix + secrets.token_hex(8)
        assert "/" not in name
        try:
            # It gets its name when it is whole and locked; killed before, we leave nothing.
            descriptor = os.open(SHARED_MEMORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                # Given a directory, Python's link follows the symbolic link that this path is.
                own = f"/proc/self/fd/{descriptor}"
                os.link(own, SHARED_MEMORY / name, src_dir_fd=descriptor)
            except OSError:
                os.close(descriptor)
                raise
        except OSError as error:
            reason = f"{error.strerror}; free space there or make the pool smaller"
            raise TransportError(f"{SHARED_MEMORY}: no segment of {size} bytes: {reason}") from None
        return cls(name, descriptor, size, is_owner=True)

    @classmethod
    def attach(cls, name: str) -> Segment:
        """The memory of another process of this user on this host."""
        try:
            if "/" in name:
                raise OSError(0, "not a name of a segment")
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(SHARED_MEMORY / name, flags)
        except OSError as error:
            reason = f"segment {name!r}: {error.strerror}"
            raise TransportError(f"{reason}; its owner has gone", peer_is_gone=True) from None
        return cls(name, descriptor, os.fstat(descriptor).st_size, is_owner=False)

    def owner_is_alive(self) -> bool:
        return self.is_owner or not is_free(self.descriptor)

    def close(self) -> None:
        """Unmap; the owner also removes the name. Views that others hold stay valid."""
        if self.descriptor < 0:
            return
        if self.is_owner:
            (SHARED_MEMORY / self.name).unlink(missing_ok=True)
        os.close(self.descriptor)
        self.descriptor = -1
        with contextlib.suppress(BufferError):  # Unmapped when the last view of it goes.
            self.buffer.release()
            self._map.close()


def is_free(descriptor: int) -> bool:
    """Has nobody the owner's lock any more?"""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True


def sweep(prefix: str) -> list[str]:
    """Remove the segments of this prefix whose owner has died; their names."""
    assert prefix.startswith("mcb-")
    removed = []
    for path in sorted(SHARED_MEMORY.glob(prefix + "*")):
        with contextlib.suppress(FileNotFoundError):  # Its owner was quicker.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if is_free(descriptor):
                    path.unlink()
                    removed.append(path.name)
            finally:
                os.close(descriptor)
    return removed


class ByteTransport(Protocol):
    """Moves bytes between the segment it was started with and those of peers, one-sidedly.

    A batch has returned when all its bytes are there. It raises TransportError at its deadline
    (seconds from now) at the latest, and it can be cancelled; either leaves the transport usable.
    Once it has returned or raised, it touches no memory of this process any more. A write that
    failed may have changed the peer's ranges, and what was under way may still do so for a
    moment. Checksums are above the transport.
    """

    name: str

    async def start(self, segment: Segment) -> Endpoint:
        """Register the memory and listen where that is needed: peers can come from now on."""

    async def read(
        self,
        peer: Endpoint,
        remote: Sequence[Range],
        local: Sequence[Range],
        deadline_s: float,
    ) -> None:
        """The peer's ranges into ours, pairwise of the same lengths."""

    async def write(
        self,
        peer: Endpoint,
        local: Sequence[Range],
        remote: Sequence[Range],
        deadline_s: float,
    ) -> None:
        """Our ranges into the peer's, pairwise of the same lengths."""

    def forget(self, peer: Endpoint) -> None:
        """The peer has gone: drop what is held for it. Transfers under way fail."""

    async def close(self) -> None:
        """Stop serving; transfers under way fail. The segment stays its owner's."""


def check_batch(local: Sequence[Range], size: int, remote: Sequence[Range], peer: Endpoint) -> int:
    """The bytes of a batch between our segment of `size` and the peer's, or TransportError."""
    if len(local) != len(remote):
        raise TransportError(f"{len(local)} local ranges for {len(remote)} of {peer.segment}")
    total, peer_size = 0, peer.size
    for ours, theirs in zip(local, remote, strict=True):
        length = ours.length
        if length != theirs.length:
            raise TransportError(f"{ours} and {theirs} of {peer.segment} differ in length")
        if length < 0 or not 0 <= ours.offset <= size - length:
            raise TransportError(f"{ours} is outside our segment of {size} bytes")
        if not 0 <= theirs.offset <= peer_size - length:
            raise TransportError(f"{theirs} is outside {peer.segment} of {peer.size} bytes")
        total += length
    return total


def cut(
    local: Sequence[Range], remote: Sequence[Range], bytes_max: int, ranges_max: int
) -> Iterator[tuple[list[Range], list[Range]]]:
    """The batch in order, in parts of at most so many bytes and ranges; long ranges are divided."""
    ours: list[Range] = []
    theirs: list[Range] = []
    room = bytes_max
    for here, there in zip(local, remote, strict=True):
        done = 0
        while done < here.length:
            length = min(room, here.length - done)
            ours.append(Range(here.offset + done, length))
            theirs.append(Range(there.offset + done, length))
            done += length
            room -= length
            if room == 0 or len(ours) == ranges_max:
                yield ours, theirs
                ours, theirs, room = [], [], bytes_max
    if ours:
        yield ours, theirs
