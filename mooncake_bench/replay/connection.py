"""What becomes of one request on one connection: tokens with their times, then a verdict."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from array import array
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

import msgspec

from mooncake_bench.replay.http1 import HttpError, ResponseReader
from mooncake_bench.replay.recorder import FAILED, FINISHED, REJECTED, Verdict
from mooncake_bench.replay.sse import SseError, SseReader, error_text

REJECTION_STATUSES = (429, 503, 529)
MAX_ERROR_BODY_BYTES = 65_536
now = time.perf_counter


class Transport(Protocol):
    """What a connection needs of asyncio's transports."""

    def write(self, data: bytes) -> None: ...

    def abort(self) -> None: ...

    def is_closing(self) -> bool: ...

    def get_write_buffer_size(self) -> int: ...


class Connection(asyncio.Protocol):
    """Carries one request at a time.

    `settled` is called once a request; `released` when the connection can carry the next one.
    """

    __slots__ = (
        "_body",
        "_reader",
        "_released",
        "_settled",
        "_sse",
        "_times",
        "_transport",
        "idle_since",
        "last_token_at",
        "row",
        "sent_at",
    )

    def __init__(
        self, settled: Callable[[Verdict], None], released: Callable[[Connection], None]
    ) -> None:
        self._settled = settled
        self._released = released
        self._transport: Transport | None = None
        self._reader: ResponseReader | None = None
        self._sse = SseReader()
        self._times = array("d")
        self._body = b""
        self.row = -1
        """The request under way; -1 when there is none (its response may still have an end)."""
        self.sent_at = self.last_token_at = self.idle_since = 0.0

    @property
    def is_usable(self) -> bool:
        """Whether a request could be sent now."""
        return self._reader is None and self.is_open

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: Any) -> None:
        # Any: uvloop's transports do not derive from asyncio.Transport.
        self._transport = transport
        self.idle_since = now()
        if (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, row: int, request: bytes) -> float:
        """Write the request; the time just before it."""
        assert self._reader is None
        assert self._transport is not None
        self.row = row
        self._reader, self._sse = ResponseReader(), SseReader(self._sse.key)
        self._times = array("d")
        self._body = b""
        self.last_token_at = 0.0
        self.sent_at = now()
        self._transport.write(request)
        return self.sent_at

    def data_received(self, data: bytes) -> None:
        self.arrived(data, now())

    def arrived(self, data: bytes, at: float) -> None:
        """Take bytes that reached this machine `at` this time, perhaps some time ago."""
        # Never before what came before: two clocks are compared to a fraction of a microsecond.
        if at < (earliest := self.last_token_at or self.sent_at):
            at = earliest
        reader = self._reader
        if reader is None:  # Nobody asked for anything: such a connection cannot be trusted.
            self.close()
            return
        try:
            pieces = reader.feed(data)
            if reader.status == 200:
                self._take_stream(reader, pieces, at)
            elif reader.status:
                self._take_error(reader, b"".join(pieces), at)
        except HttpError as error:
            self.fail(f"bad response: {error}", at)
        except SseError as error:
            self.fail(f"bad stream: {error}", at)
        else:
            if reader.is_complete and self._reader is reader:
                self._release(reader)

    def eof_received(self) -> None:
        """Let the transport close: half-open connections are of no use here."""

    def connection_lost(self, error: Exception | None) -> None:
        reader, self._transport = self._reader, None
        if self.row < 0 or reader is None:
            return
        at = now()
        try:
            reader.closed()
            if reader.status == 200:
                self._take_stream(reader, [], at)
            else:
                self._take_error(reader, b"", at)
        except HttpError:
            self._end(FAILED, at, self._cut_reason(reader, error))
        except SseError as problem:
            self._end(FAILED, at, f"bad stream: {problem}")

    def fail(self, reason: str, at: float) -> None:
        """Give the request up; the connection with it."""
        self.close()
        if self.row >= 0:
            self._end(FAILED, at, reason)

    def close(self) -> None:
        if self._transport is not None:
            # abort, not close: a large body may still wait for a server that reads no more.
            self._transport.abort()

    def _take_stream(self, reader: ResponseReader, pieces: list[bytes], at: float) -> None:
        if self.row < 0:
            return
        sse = self._sse
        tokens = sse.feed(pieces) if pieces else 0
        if reader.is_complete:
            tokens += sse.close()
        if tokens:
            self.last_token_at = at
            if tokens == 1:
                self._times.append(at)
            else:
                self._times.extend(array("d", (at,)) * tokens)
        if sse.error:
            self._end(FAILED, at, f"error in the stream: {sse.error}")
            self.close()
        elif sse.is_done:
            # The last token ended the request; [DONE] only says so.
            self._end(FINISHED, self.last_token_at or at, "")
        elif reader.is_complete:
            kind = reader.headers.get(b"content-type", b"").partition(b";")[0].decode("latin-1")
            is_stream = kind in ("text/event-stream", "")
            what = "stream cut before [DONE]" if is_stream else f"no stream but {kind}"
            self._end(FAILED, at, what)

    def _take_error(self, reader: ResponseReader, body: bytes, at: float) -> None:
        if len(self._body) < MAX_ERROR_BODY_BYTES:
            self._body += body
        if not reader.is_complete or self.row < 0:
            return
        said = reader.headers.get(b"x-rejection-reason", b"").decode("latin-1")[:120]
        said = said or _reason_in(self._body)
        if reader.status in REJECTION_STATUSES:
            wait_s = _seconds_of(reader.headers.get(b"retry-after", b""))
            self._end(REJECTED, at, said or f"http {reader.status}", wait_s)
        else:
            self._end(FAILED, at, f"http {reader.status}" + (f": {said}" if said else ""))

    def _cut_reason(self, reader: ResponseReader, error: Exception | None) -> str:
        if reader.status == 200:
            return "stream cut before [DONE]"
        how = "reset" if isinstance(error, ConnectionResetError | BrokenPipeError) else "closed"
        return f"connection {how} " + ("inside" if reader.status else "before") + " the response"

    def _end(self, status: int, at: float, reason: str, retry_after_s: float = math.nan) -> None:
        row, self.row = self.row, -1
        assert row >= 0
        http_status = self._reader.status if self._reader is not None else 0
        self._settled(
            Verdict(
                row,
                status,
                at,
                reason,
                http_status,
                self._times,
                self._sse.usage,
                self._sse.timeline,
                retry_after_s,
            )
        )
        self.idle_since = now()

    def _release(self, reader: ResponseReader) -> None:
        """The response has ended: back to the pool, unless something speaks against it."""
        assert self.row < 0
        if self._transport is None or self._transport.is_closing():
            return
        unsent = self._transport.get_write_buffer_size()
        if not reader.keep_alive or reader.trailing or unsent:
            self.close()
            return
        self._reader = None
        self.idle_since = now()
        self._released(self)


def _seconds_of(retry_after: bytes) -> float:
    """The header's value, seconds or a date, as seconds from now; NaN where it says nothing."""
    text = retry_after.decode("latin-1")
    if text.isdecimal():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return math.nan
    # Only GMT is allowed; without a zone in the text it is GMT all the same.
    date = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return max(0.0, date.timestamp() - time.time())


def _reason_in(body: bytes) -> str:
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
    return error_text(value) if isinstance(value, dict) else ""
