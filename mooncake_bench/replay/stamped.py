"""When did these bytes reach this machine, whatever this process was doing? The kernel's stamps.

A loop tells when it came to read; on a core that slept or was taken by somebody else that is a
tenth of a millisecond to many milliseconds late. Linux notes the arrival of each packet where it is
asked to (SO_TIMESTAMPNS, socket(7)); reads then carry that time, of the last packet in them.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
import time

from mooncake_bench.replay.connection import Connection, now

IS_OFFERED = sys.platform == "linux"
_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("@ll")
_ANCILLARY_BYTES = 64
READ_BYTES = 65_536


class KernelClock:
    """The kernel's stamps, which are of the wall clock, as seconds of time.perf_counter()."""

    def __init__(self) -> None:
        self.missing = 0
        """Reads that carried no stamp."""
        # Linux stamps packets while any socket asks for it, and begins a moment later.
        self._asks = socket.socket()
        ask_for_stamps(self._asks)
        self.follow()

    def close(self) -> None:
        self._asks.close()

    def follow(self) -> None:
        """Compare the clocks again: the wall clock is being corrected all the time."""
        before = time.perf_counter_ns()
        wall = time.time_ns()
        ahead_ns = wall - (before + time.perf_counter_ns()) // 2
        # In two parts: a double holds no nanoseconds since 1970.
        self._ahead_s, self._ahead_ns = divmod(ahead_ns, 1_000_000_000)

    def stamp(self, ancillary: list[tuple[int, int, bytes]]) -> float:
        """When what was read arrived, at the latest now; now where the kernel does not say."""
        current = now()
        if not ancillary:
            self.missing += 1
            return current
        # Nothing else was asked for, so nothing else is there.
        seconds, nanoseconds = _TIMESPEC.unpack(ancillary[0][2])
        at: float = seconds - self._ahead_s + (nanoseconds - self._ahead_ns) * 1e-9
        return at if at < current else current


class StampedTransport:
    """As much of asyncio.Transport as a Connection needs; it writes at once and reads with stamps.

    Plain TCP only.
    """

    def __init__(self, sock: socket.socket, connection: Connection, clock: KernelClock) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = sock
        self._connection = connection
        self._clock = clock
        self._unsent: bytes | memoryview = b""
        ask_for_stamps(sock)
        self._loop.add_reader(sock.fileno(), self._read)
        connection.connection_made(self)

    def get_extra_info(self, name: str) -> socket.socket | None:
        return self._socket if name == "socket" else None

    def is_closing(self) -> bool:
        return self._socket is None

    def get_write_buffer_size(self) -> int:
        return len(self._unsent)

    def write(self, data: bytes) -> None:
        """Hand the bytes to the kernel before returning, or as many as it takes."""
        assert not self._unsent  # A connection carries one request at a time.
        self._write_some(data)
        if self._unsent and self._socket is not None:
            self._loop.add_writer(self._socket.fileno(), self._write_rest)

    def abort(self) -> None:
        self._lose(None)

    def _read(self) -> None:
        if self._socket is None:
            return
        try:
            data, ancillary, _, _ = self._socket.recvmsg(READ_BYTES, _ANCILLARY_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        if data:
            self._connection.arrived(data, self._clock.stamp(ancillary))
        else:
            self._lose(None)

    def _write_rest(self) -> None:
        self._write_some(self._unsent)
        if not self._unsent and self._socket is not None:
            self._loop.remove_writer(self._socket.fileno())

    def _write_some(self, data: bytes | memoryview) -> None:
        self._unsent = data
        if self._socket is None:
            return
        try:
            sent = self._socket.send(data)
            self._unsent = memoryview(data)[sent:] if sent < len(data) else b""
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError | None) -> None:
        """Close; the connection is told later, as by asyncio's transports."""
        if self._socket is None:
            return
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._socket = None
        self._unsent = b""
        self._loop.call_soon(self._connection.connection_lost, error)


def ask_for_stamps(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)


async def connect(host: str, port: int, connection: Connection, clock: KernelClock) -> None:
    """Open a stamped connection to an address (no name). Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (host, port))
        StampedTransport(sock, connection, clock)
    except BaseException:
        sock.close()
        raise
