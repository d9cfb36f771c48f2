"""Where does the answer to a request begin and end in the bytes of a connection (HTTP/1.1)?

Sans I/O: bytes go in, body bytes come out, so that any split of the stream gives the same body.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

MAX_HEAD_BYTES = 65_536
MAX_LINE_BYTES = 4_096
"""Of a chunk-size line or a trailer."""
_SIZES = {form % size: size for size in range(4096) for form in (b"%x", b"%X")}
"""The chunk sizes that streams of tokens use; others are read one by one."""


class HttpError(ValueError):
    """The bytes are no HTTP/1.1 response within our limits."""


class _Part:
    """What is read next. No Enum: looking one up costs more than a read of the body does."""

    HEAD, LENGTH, UNTIL_CLOSE, CHUNK_SIZE, CHUNK, CHUNK_END, TRAILERS, DONE = range(8)


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
        return self._part == _Part.DONE

    def feed(self, data: bytes) -> list[bytes]:
        """The pieces of the body that `data` completes, a chunk each; raises HttpError."""
        if self._held:
            data, self._held = self._held + data, b""
        if self._part == _Part.HEAD:
            data = self._take_head(data)
            if self._part == _Part.HEAD:
                return []
        if self._part == _Part.UNTIL_CLOSE:
            return [data]
        if self._part == _Part.LENGTH:
            return [self._take_length(data)]
        return self._take_chunks(data)

    def closed(self) -> None:
        """The server has closed: an end for a body without a length, an HttpError otherwise."""
        if self._part == _Part.UNTIL_CLOSE:
            self._part = _Part.DONE
        elif self._part != _Part.DONE:
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
            head, data = _read_head(data[:end]), data[end + 4 :]
            if head.status >= 200:
                self.status, self.headers, self.keep_alive, self._part, self._left = head
                return data

    def _take_length(self, data: bytes) -> bytes:
        body = data[: self._left]
        self._left -= len(body)
        if not self._left:
            self._part = _Part.DONE
            self.trailing = data[len(body) :]
        return body

    def _take_chunks(self, data: bytes) -> list[bytes]:
        if self._part != _Part.CHUNK_SIZE:
            return self._take_pieces(data)
        # What servers do most of the time: a read is some whole chunks, perhaps with a rest.
        pieces, rest = _whole_chunks(data)
        if rest:
            pieces.extend(self._take_pieces(rest))
        elif pieces and not pieces[-1]:
            pieces.pop()
            self._part = _Part.DONE
        return pieces

    def _take_pieces(self, data: bytes) -> list[bytes]:
        """The same chunk by chunk, whatever is cut or comes after."""
        pieces: list[bytes] = []
        at = 0
        is_cut = self._part != _Part.CHUNK_SIZE
        while True:
            if self._part == _Part.CHUNK:
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left:
                    break
                self._part = _Part.CHUNK_END
            if self._part == _Part.CHUNK_END:
                if len(data) < at + 2:
                    self._held = data[at:]
                    break
                if data[at : at + 2] != b"\r\n":
                    raise HttpError("chunk does not end where its size says")
                at += 2
                self._part = _Part.CHUNK_SIZE
                if is_cut:  # Tried once a read: some servers' chunks all need the careful way.
                    is_cut = False
                    whole, rest = _whole_chunks(data[at:])
                    pieces += whole
                    at = len(data) - len(rest)
                    if whole and not whole[-1]:
                        self._part = _Part.DONE
            if self._part == _Part.DONE:
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
        return pieces

    def _read_line(self, line: bytes) -> None:
        """A chunk size or, after the last chunk, a trailer (skipped) or the final empty line."""
        if self._part == _Part.TRAILERS:
            if not line:
                self._part = _Part.DONE
            return
        digits = line.partition(b";")[0].strip()
        # int() would take signs and underscores too.
        if not digits or digits.strip(b"0123456789abcdefABCDEF"):
            raise HttpError("chunk size is no hexadecimal number")
        self._left = int(digits, 16)
        self._part = _Part.CHUNK if self._left else _Part.TRAILERS


class _Head(NamedTuple):
    """A response's head, and what it says of the body."""

    status: int
    headers: dict[bytes, bytes]
    keep_alive: bool
    part: int
    left: int
    """The body's length, if the head tells it."""


@lru_cache(maxsize=64)  # Within a second, the heads of a server's streams are often the same.
def _read_head(head: bytes) -> _Head:
    """Raises HttpError."""
    status_line, *lines = head.split(b"\r\n")
    if len(status_line) < 12 or not status_line[9:12].isdigit() or status_line[9:10] == b"0":
        raise HttpError("no status in the first line of the response")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon:
            raise HttpError("header without a colon")
        headers[name.strip().lower()] = value.strip()
    status = int(status_line[9:12])
    connection = headers.get(b"connection", b"").lower()
    is_1_1 = status_line[5:8] == b"1.1"
    keep_alive = b"close" not in connection if is_1_1 else b"keep-alive" in connection
    part, left = _framing(status, headers)
    return _Head(status, headers, keep_alive and part != _Part.UNTIL_CLOSE, part, left)


def _framing(status: int, headers: dict[bytes, bytes]) -> tuple[int, int]:
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise HttpError("the response is compressed, which was not asked for")
    length = headers.get(b"content-length")
    if status in (204, 304):
        return _Part.DONE, 0
    if b"chunked" in headers.get(b"transfer-encoding", b"").lower():
        return _Part.CHUNK_SIZE, 0
    if length is None:
        return _Part.UNTIL_CLOSE, 0
    if not length.isdigit():
        raise HttpError("content-length is no number")
    return (_Part.LENGTH if int(length) else _Part.DONE), int(length)


def _whole_chunks(data: bytes) -> tuple[list[bytes], bytes]:
    """The payloads of the whole chunks that `data` begins with, and the rest.

    An empty payload is the last chunk, without trailers; it comes last, and nothing after it.
    Exact where it finds something: a payload is as long as its size line says, or left to others.
    """
    lines = data.split(b"\r\n")
    sizes = list(map(_SIZES.get, lines[0:-1:2]))
    pieces = lines[1:-1:2]
    lengths = list(map(len, pieces))
    count = len(pieces)
    if sizes[:count] != lengths or 0 in lengths[:-1]:
        ends = (n for n, size in enumerate(sizes[:count]) if not size or size != lengths[n])
        count = next(ends, count)
    rest = b"\r\n".join(lines[2 * count :])
    if rest and count and not lengths[count - 1]:  # Something follows the last chunk.
        count -= 1
        rest = b"\r\n".join(lines[2 * count :])
    return pieces[:count], rest
