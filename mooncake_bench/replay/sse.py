"""Which bytes of a stream are tokens, which are usage, an error, or the end?

A token is an event whose delta holds content, text or reasoning content. Keys are found on the
bytes: in JSON a quote inside a string is escaped, so `"text"` followed by a colon is always a key.
JSON is decoded only for events with usage, a timeline or an error in them. Most token events of a
stream differ in their texts only: they are recognised by what is around the text, one by one
(`_take_event`) or many at a time (`_count_alike`).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import msgspec

MAX_EVENT_BYTES = 1 << 20

_TOKEN = re.compile(rb'"(?:content|text|reasoning_content|reasoning)"\s*:\s*"(?!")')
_DONE = b"[DONE]"
_END = b"data: [DONE]"


class SseError(ValueError):
    """The stream is no stream of JSON events within our limits."""


class SseReader:
    """Reads one stream; what it has learnt so far is in its attributes."""

    __slots__ = (
        "_after",
        "_before",
        "_held",
        "_held_return",
        "error",
        "is_done",
        "key",
        "timeline",
        "usage",
    )

    def __init__(self, key: bytes = b'"text":"') -> None:
        self.key = key
        """How the last token event began its text: a guess at the next one."""
        self.is_done = False
        """`[DONE]` was seen; later events are ignored."""
        self.error = ""
        self.usage: dict[str, Any] = {}
        self.timeline: dict[str, Any] = {}
        self._before = self._after = b""
        """What stands around the text of a token event; empty while none is known."""
        self._held = b""
        self._held_return = False

    def feed(self, pieces: list[bytes]) -> int:
        """How many token events the pieces of the body complete; raises SseError."""
        if len(pieces) < 4:
            return sum(map(self._take_piece, pieces))
        tokens, first = self._take_piece(pieces[0]), 1
        if not self._before or not pieces[1].startswith(self._before):
            # The first event had a role beside its text, say: the second one is worth knowing.
            tokens, first = tokens + self._take_piece(pieces[1]), 2
        alike = self._count_alike(pieces, first)
        return tokens + alike + sum(map(self._take_piece, pieces[first + alike :]))

    def _take_piece(self, piece: bytes) -> int:
        """As `feed`: most pieces are an event each."""
        is_event = piece.find(b"\n") == len(piece) - 2 and piece.endswith(b"\n")
        if not is_event or self._held or self._held_return or b"\r" in piece:
            return self._feed_any(piece)
        return self._take_event(piece[:-2])

    def _count_alike(self, pieces: list[bytes], first: int) -> int:
        """How many pieces from the `first` on are whole events that differ in text only.

        They are what the known event is around its text, and their texts have no quote, backslash
        or line end in them: so they are tokens, and can hold nothing else.
        """
        before, after = self._before, self._after
        if not before or self._held or self._held_return or self.is_done or self.error:
            return 0
        last = len(pieces)
        while last > first and not (
            pieces[last - 1].endswith(after) and pieces[last - 1].startswith(before)
        ):
            last -= 1
        begin, end = len(before), -len(after)
        alike = pieces[first:last]
        texts = [piece[begin:end] for piece in alike]
        together = b"".join(texts)
        is_alike = (
            all(texts)
            and b'"' not in together
            and b"\\" not in together
            and b"\n" not in together
            and b"\r" not in together
            # The texts have the right lengths, so equal together is equal one by one.
            and b"".join(alike) == before + (after + before).join(texts) + after
        )
        return len(alike) if is_alike else 0

    def _feed_any(self, data: bytes) -> int:
        if self._held_return or b"\r" in data:
            data = self._with_newlines(data)
        *events, self._held = (self._held + data).split(b"\n\n")
        if len(self._held) > MAX_EVENT_BYTES:
            raise SseError(f"an event is longer than {MAX_EVENT_BYTES} bytes")
        return sum(map(self._take_event, events))

    def close(self) -> int:
        """The body has ended, perhaps without the last blank line; as `feed`."""
        if not self._held and not self._held_return:
            return 0
        rest, self._held = self._held, b""
        if self._held_return:
            self._held_return = False
            rest += b"\n"
        return sum(map(self._take_event, rest.split(b"\n\n")))

    def _with_newlines(self, data: bytes) -> bytes:
        """`data` with every line end as a newline; a last `\\r` waits for what follows it."""
        if self._held_return:
            data = b"\r" + data
        self._held_return = data.endswith(b"\r")
        if self._held_return:
            data = data[:-1]
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _take_event(self, event: bytes) -> bool:
        """An event without the blank line after it; whether it is a token."""
        if self.is_done or self.error:
            return False
        before = self._before
        if not before or not event.startswith(before):
            if event == _END:
                self.is_done = True
                return False
            before = event[: event.find(self.key) + len(self.key)]
            if not (before.endswith(self.key) and before.startswith(b"data: {")):
                return self._take_lines(event)
            if not _is_plain(before):
                return self._take_lines(event)
        start = len(before)
        stop = event.find(b'"', start)
        if stop <= start or b"\\" in event[start:stop] or b"\n" in event:
            return self._take_lines(event)
        if not _is_plain_end(event[stop:]):
            return self._take_lines(event)
        if before is not self._before:
            self._before, self._after = before, event[stop:] + b"\n\n"
        return True

    def _take_lines(self, event: bytes) -> bool:
        """An event of whatever form: several lines, comments, other fields; as `_take_event`."""
        if event.startswith(b"data: {") and b"\n" not in event:
            return self._take_payload(event[6:])
        if event.startswith(b"\xef\xbb\xbf"):
            event = event[3:]
        parts: list[bytes] = []
        kind = b""
        for line in event.split(b"\n"):
            name, _, value = line.partition(b":")
            if name == b"data":
                parts.append(value.removeprefix(b" "))
            elif name == b"event":
                kind = value.strip()
        payload = b"\n".join(parts).strip()
        if not payload:
            return False
        if payload == _DONE:
            self.is_done = True
            return False
        if kind == b"error":
            self.error = _clean(payload)
            return False
        if not payload.startswith(b"{"):
            raise SseError("an event holds no JSON object")
        return self._take_payload(payload)

    def _take_payload(self, payload: bytes) -> bool:
        if not _is_plain(payload) and not self._learn(payload):
            return False
        found = _TOKEN.search(payload)
        if found is not None:
            self.key = found.group()
        return found is not None

    def _learn(self, payload: bytes) -> bool:
        """Decode an event; whether it may hold a token, too."""
        try:
            value = msgspec.json.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise SseError("an event holds broken JSON") from None
        assert isinstance(value, dict)
        if value.get("error") or value.get("object") == "error":
            self.error = error_text(value)
        if isinstance(value.get("usage"), dict):
            self.usage = value["usage"]
        if isinstance(value.get("timeline"), dict):
            self.timeline = value["timeline"]
        return not self.error and value.get("choices") != []


def _is_plain(part: bytes) -> bool:
    """Whether nothing in this part of an event has to be decoded."""
    if b'"usage"' in part:
        nulls = part.count(b'"usage":null') + part.count(b'"usage": null')
        if part.count(b'"usage"') > nulls:
            return False
    return b'"error"' not in part and b'"timeline"' not in part


@lru_cache(maxsize=64)  # The events of a server end in a few ways.
def _is_plain_end(part: bytes) -> bool:
    """The same of what follows the text up to the end of the event."""
    return part.endswith(b"}") and _is_plain(part)


def error_text(body: dict[str, Any]) -> str:
    """A short reason from an error object of OpenAI's or FastAPI's shape; "" if there is none."""
    error = body.get("error")
    source = error if isinstance(error, dict) else body
    for key in ("reason", "type", "message", "code", "detail"):
        if isinstance(source.get(key), str | int) and source[key] != "":
            return _clean(str(source[key]).encode())
    return _clean(error.encode()) if isinstance(error, str) else ""


def _clean(text: bytes) -> str:
    """One printable line of at most 120 characters: servers put anything into messages."""
    line = " ".join(text.decode(errors="replace").split())
    return "".join(character for character in line if character.isprintable())[:120]
