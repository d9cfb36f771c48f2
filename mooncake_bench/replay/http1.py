"""Where does the answer to a request begin and end in the bytes of a connection (HTTP/1.1)?

Sans I/O: bytes go in, body bytes come out, so that any split of the stream gives the same body.
"""

from __future__ import annotations

from enum import Enum

MAX_HEAD_BYTES = 65_536
MAX_LINE_BYTES = 4_096
"""Of a chunk-size line or a trailer."""


class HttpError(ValueError):
    """The bytes are no HTTP/1.1 response within our limits."""


class _Part(Enum):
    HEAD = "head"
    LENGTH = "length"
    UNTIL_CLOSE = "until close"
    CHUNK_SIZE = "chunk size"
    CHUNK = "chunk"
    CHUNK_END = "chunk end"
    TRAILERS = "trailers"
    DONE = "done"


class ResponseReader:
    """Reads one response; `feed` until `is_complete`, `closed` when the connection has ended."""

    __slots__ = ("_held", "_left", "_part", "headers", "keep_alive", "status", "trailing")

    def __init__(self) -> None:
        self.status = 0
        """0 until the whole head has arrived."""
        self.headers: dict[bytes, bytes] = {}
        self.keep_alive = True
        self.trailing = b""
        """Bytes after the end of the response; nobody asked for them."""
        self._part = _Part.HEAD
        self._held = b""
        self._left = 0

    @property
    def is_complete(self) -> bool:
        return self._part is _Part.DONE

    def feed(self, data: bytes) -> bytes:
        """The body bytes that `data` completes; raises HttpError."""
        if self._held:
            data, self._held = self._held + data, b""
        if self._part is _Part.HEAD:
            data = self._take_head(data)
            if self._part is _Part.HEAD:
                return b""
        if self._part is _Part.UNTIL_CLOSE:
            return data
        if self._part is _Part.LENGTH:
            return self._take_length(data)
        return self._take_chunks(data)

    def closed(self) -> None:
        """The server has closed: an end for a body without a length, an HttpError otherwise."""
        if self._part is _Part.UNTIL_CLOSE:
            self._part = _Part.DONE
        elif self._part is not _Part.DONE:
            raise HttpError("connection closed inside the response")

    def _take_head(self, data: bytes) -> bytes:
        """What follows the head; keeps an incomplete head. Skips 1xx responses."""
        while True:
            end = data.find(b"\r\n\r\n")
            if data and not b"HTTP/1.".startswith(data[:7]):
                raise HttpError("not HTTP/1.1")
            if end > MAX_HEAD_BYTES or (end < 0 and len(data) > MAX_HEAD_BYTES):
                raise HttpError("response head too long")
            if end < 0:
                self._held = data
                return b""
            head, data = data[:end], data[end + 4 :]
            self._read_head(head)
            if self.status >= 200:
                self._choose_framing(head[5:8] == b"1.1")
                return data
            self.status = 0

    def _read_head(self, head: bytes) -> None:
        status_line, *lines = head.split(b"\r\n")
        if len(status_line) < 12 or not status_line[9:12].isdigit():
            raise HttpError("no status in the first line of the response")
        self.status = int(status_line[9:12])
        if self.status < 100:
            raise HttpError("no status in the first line of the response")
        self.headers = {}
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon:
                raise HttpError("header without a colon")
            self.headers[name.strip().lower()] = value.strip()

    def _choose_framing(self, is_1_1: bool) -> None:
        connection = self.headers.get(b"connection", b"").lower()
        self.keep_alive = b"close" not in connection if is_1_1 else b"keep-alive" in connection
        length = self.headers.get(b"content-length")
        if self.status in (204, 304):
            self._part = _Part.DONE
        elif b"chunked" in self.headers.get(b"transfer-encoding", b"").lower():
            self._part = _Part.CHUNK_SIZE
        elif length is not None:
            if not length.isdigit():
                raise HttpError("content-length is no number")
            self._left = int(length)
            self._part = _Part.LENGTH if self._left else _Part.DONE
        else:
            self.keep_alive = False
            self._part = _Part.UNTIL_CLOSE
        if b"content-encoding" in self.headers and self.headers[b"content-encoding"] != b"identity":
            raise HttpError("the response is compressed, which was not asked for")

    def _take_length(self, data: bytes) -> bytes:
        body = data[: self._left]
        self._left -= len(body)
        if not self._left:
            self._part = _Part.DONE
            self.trailing = data[len(body) :]
        return body

    def _take_chunks(self, data: bytes) -> bytes:
        pieces: list[bytes] = []
        at = 0
        while True:
            if self._part is _Part.CHUNK:
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left:
                    break
                self._part = _Part.CHUNK_END
            if self._part is _Part.CHUNK_END:
                if len(data) < at + 2:
                    self._held = data[at:]
                    break
                if data[at : at + 2] != b"\r\n":
                    raise HttpError("chunk does not end where its size says")
                at += 2
                self._part = _Part.CHUNK_SIZE
            if self._part is _Part.DONE:
                self.trailing = data[at:]
                break
            end = data.find(b"\r\n", at)
            if end - at > MAX_LINE_BYTES or (end < 0 and len(data) - at > MAX_LINE_BYTES):
                raise HttpError("chunk size or trailer too long")
            if end < 0:
                self._held = data[at:]
                break
            self._read_line(data[at:end])
            at = end + 2
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_line(self, line: bytes) -> None:
        """A chunk size or, after the last chunk, a trailer (skipped) or the final empty line."""
        if self._part is _Part.TRAILERS:
            if not line:
                self._part = _Part.DONE
            return
        digits = line.partition(b";")[0].strip()
        # int() would take signs and underscores too.
        if not digits or digits.strip(b"0123456789abcdefABCDEF"):
            raise HttpError("chunk size is no hexadecimal number")
        self._left = int(digits, 16)
        self._part = _Part.CHUNK if self._left else _Part.TRAILERS
