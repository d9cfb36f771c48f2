"""Any split of the bytes gives the same response."""

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_bench.replay.http1 import MAX_HEAD_BYTES, HttpError, ResponseReader

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Odd:  a:b \r\n\r\n"
    b"5;name=value\r\nhello\r\n0B\r\n, wide\r\nwor\r\n2\r\nld\r\n0\r\nTrailer: x\r\n\r\n"
)
LENGTH = b"HTTP/1.1 429 Too Many\r\ncontent-length: 7\r\n\r\nrefused"
HINTS = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: y\r\n\r\n" + LENGTH
NOTHING = b"HTTP/1.1 204 No Content\r\n\r\n"
WHOLE = [
    (CHUNKED, 200, b"hello, wide\r\nworld"),
    (LENGTH, 429, b"refused"),
    (HINTS, 429, b"refused"),
    (NOTHING, 204, b""),
]


def read(pieces: list[bytes]) -> tuple[ResponseReader, bytes]:
    reader = ResponseReader()
    return reader, b"".join(b"".join(reader.feed(piece)) for piece in pieces if piece)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@pytest.mark.parametrize(("data", "status", "body"), WHOLE)
def test_a_response_split_at_every_byte_reads_the_same(data, status, body):
    """Two pieces, cut at each of the boundaries, and single bytes."""
    cuts = [[data[:at], data[at:]] for at in range(len(data) + 1)]
    for pieces in [*cuts, [data[at : at + 1] for at in range(len(data))]]:
        reader, got = read(pieces)
        assert (reader.status, got, reader.is_complete) == (status, body, True)


@given(
    st.binary(max_size=200),
    st.lists(st.integers(1, 20), max_size=30),
    st.lists(st.integers(0, 2000), max_size=12),
)
def test_any_chunking_and_any_split_give_the_body_back(body, sizes, places):
    """The chunk sizes of the server and the packets of the network are not ours to choose."""
    data, rest = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", body
    for size in sizes:
        part, rest = rest[:size], rest[size:]
        if part:
            data += b"%X\r\n%s\r\n" % (len(part), part)
    if rest:
        data += b"%x\r\n%s\r\n" % (len(rest), rest)
    reader, got = read(cut(data + b"0\r\n\r\n", places))
    assert got == body
    assert reader.is_complete
    assert reader.keep_alive


def test_a_body_without_a_length_ends_with_the_connection():
    """HTTP/1.0 style: only the close tells, and the connection cannot be kept."""
    reader, got = read([b"HTTP/1.1 200 OK\r\n\r\nabc", b"def"])
    assert (got, reader.is_complete, reader.keep_alive) == (b"abcdef", False, False)
    reader.closed()
    assert reader.is_complete


@pytest.mark.parametrize("data", [CHUNKED[:-1], CHUNKED[:90], LENGTH[:-1], b"HTTP/1.1 2", b""])
def test_a_cut_response_is_an_error_when_the_connection_closes(data):
    """Wherever the cut is, a missing end is noticed."""
    reader, _ = read([data])
    with pytest.raises(HttpError, match="closed"):
        reader.closed()


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"\x16\x03\x01garbage",
        b"HTTP/1.1 xyz\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * MAX_HEAD_BYTES,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 10_000,
    ],
)
def test_what_is_no_response_is_an_error_and_bounded(data):
    """Garbage, wrong sizes, endless heads and chunk sizes."""
    with pytest.raises(HttpError):
        read([data])


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_arbitrary_bytes_never_raise_anything_else(data, places):
    """A server may send anything; an HttpError or a body, never a crash."""
    with contextlib.suppress(HttpError):
        reader, body = read(cut(data, places))
        assert reader.status or not body


@pytest.mark.parametrize(
    ("head", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: Keep-Alive", True),
    ],
)
def test_keep_alive_follows_version_and_header(head, kept):
    """1.1 keeps unless told otherwise, 1.0 the other way round."""
    reader, _ = read([head + b"\r\n\r\n"])
    assert reader.keep_alive is kept


def test_bytes_after_the_end_are_told():
    """Nobody asked for them: such a connection must not be used again."""
    assert read([LENGTH + b"HTTP"])[0].trailing == b"HTTP"
    assert read([CHUNKED + b"x"])[0].trailing == b"x"
