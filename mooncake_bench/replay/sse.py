"""Which bytes of a stream are tokens, which are usage, an error, or the end?

A token is an event whose delta holds content, text or reasoning content. Keys are found on the
bytes: in JSON a quote inside a string is escaped, so `"text"` followed by a colon is always a key.
JSON is decoded only for events with usage, a timeline or an error in them. Most token events of a
stream differ in their texts only: they are recognised by what is around the text (`_find_alike`).
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

MAX_EVENT_BYTES = 1 << 20

_TOKEN = re.compile(rb'"(?:content|text|reasoning_content|reasoning)"\s*:\s*"(?!")')
_SPECIAL = re.compile(
    rb'"(?:usage|timeline)"\s*:\s*\{|"error"\s*:\s*+(?!null)|"object"\s*:\s*"error"|(?:^|\n)event:'
)
_DONE = b"[DONE]"


class SseError(ValueError):
    """The stream is no stream of JSON events within our limits."""


class SseReader:
    """Reads one stream; what it has learnt so far is in its attributes."""

    __slots__ = ("_alike", "_held", "_held_return", "error", "is_done", "key", "timeline", "usage")

    def __init__(self, key: bytes = b'"text":"') -> None:
        self.key = key
        """How the last token event began its text: a guess at the next one."""
        self.is_done = False
        """`[DONE]` was seen; later events are ignored."""
        self.error = ""
        self.usage: dict[str, Any] = {}
        self.timeline: dict[str, Any] = {}
        self._alike: tuple[bytes, bytes] | None = None
        """What stands before and after the text of a token event, up to the next event."""
        self._held = b""
        self._held_return = False

    def feed(self, pieces: list[bytes]) -> int:
        """How many token events the pieces of the body complete; raises SseError."""
        tokens = 0
        if self._alike is None or self._held:
            # The second event is worth knowing: the first one often has a role beside its text.
            tokens = self._feed_any(b"".join(pieces[:2]))
            pieces = pieces[2:]
        first, last = self._find_alike(pieces)
        if first:
            tokens += self._feed_any(b"".join(pieces[:first]))
        if last > first and (self._held or self._held_return or self.is_done or self.error):
            last = first
        tokens += last - first
        return tokens + self._feed_any(b"".join(pieces[last:])) if last < len(pieces) else tokens

    def _find_alike(self, pieces: list[bytes]) -> tuple[int, int]:
        """Which pieces, from one to before another, are whole events that differ in text only.

        They are what the known event is around its text, and their texts have no quote, backslash
        or line end in them: so they are tokens, and can hold nothing else.
        """
        if self._alike is None:
            return 0, 0
        before, after = self._alike
        first, last = 0, len(pieces)
        while first < last and not (pieces[first].startswith(before)):
            first += 1
        while first < last and not (
            pieces[last - 1].endswith(after) and pieces[last - 1].startswith(before)
        ):
            last -= 1
        begin, end = len(before), -len(after)
        texts = [piece[begin:end] for piece in pieces[first:last]]
        together = b"".join(texts)
        is_alike = (
            all(texts)
            and b'"' not in together
            and b"\\" not in together
            and b"\n" not in together
            and b"\r" not in together
            # The texts have the right lengths, so equal together is equal one by one.
            and b"".join(pieces[first:last]) == before + (after + before).join(texts) + after
        )
        return (first, last) if is_alike else (0, 0)

    def _feed_any(self, data: bytes) -> int:
        if self._held_return or b"\r" in data:
            data = self._with_newlines(data)
        if self._held:
            data = self._held + data
        end = data.rfind(b"\n\n") + 2
        if end < 2:
            end = 0
        self._held = data[end:]
        if len(self._held) > MAX_EVENT_BYTES:
            raise SseError(f"an event is longer than {MAX_EVENT_BYTES} bytes")
        return self._take(data[:end]) if end else 0

    def close(self) -> int:
        """The body has ended, perhaps without the last blank line; as `feed`."""
        rest, self._held = self._held, b""
        if self._held_return:
            self._held_return = False
            rest += b"\n"
        return self._take_each(rest) if rest.strip() else 0

    def _with_newlines(self, data: bytes) -> bytes:
        """`data` with every line end as a newline; a last `\\r` waits for what follows it."""
        if self._held_return:
            data = b"\r" + data
        self._held_return = data.endswith(b"\r")
        if self._held_return:
            data = data[:-1]
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _take(self, data: bytes) -> int:
        """Count events of one line each, `data: {...}`, after searches over all of them."""
        if self.is_done or self.error or b'"error"' in data or b'"timeline"' in data:
            return self._take_each(data)
        events = data.split(b"\n\n")
        events.pop()
        is_done = bool(events) and events[-1] == b"data: [DONE]"
        starts = data.count(b"\n\ndata: {") + data.startswith(b"data: {")
        if starts + is_done != len(events) or data.count(b"\n") != 2 * len(events):
            return self._take_each(data)
        if is_done:
            events.pop()
        usage = b""
        if b'"usage"' in data:
            nulls = data.count(b'"usage":null') + data.count(b'"usage": null')
            others = data.count(b'"usage"') - nulls
            if others > 1 or (others and b'"usage"' not in events[-1]):
                return self._take_each(data)
            if others:
                usage = events.pop()
        tokens = self._count_tokens(events)
        if usage:
            tokens += _TOKEN.search(usage) is not None
            self._learn(usage[6:])
        self.is_done = is_done
        return tokens

    def _count_tokens(self, events: list[bytes]) -> int:
        """Count among plain events, of which it learns what they are like."""
        tokens, event, start, key = 0, b"", 0, self.key
        empty = key + b'"'
        for event in events:
            if key in event and empty not in event:
                tokens += 1
                start = event.find(key) + len(key)
            elif found := _TOKEN.search(event):
                tokens += 1
                self.key = key = found.group()
                empty = key + b'"'
                start = found.end()
            else:
                start = 0
        if start:
            self._learn_alike(event, start)
        return tokens

    def _learn_alike(self, event: bytes, start: int) -> None:
        """The plain event's text begins at `start`: others may be like it."""
        stop = event.find(b'"', start)
        if stop > start and b"\\" not in event[start:stop]:
            self._alike = (event[:start], event[stop:] + b"\n\n")

    def _take_each(self, events: bytes) -> int:
        tokens = 0
        for event in events.split(b"\n\n"):
            if self.is_done:
                break
            tokens += self._take_lines(event)
        return tokens

    def _take_lines(self, event: bytes) -> bool:
        """An event in full: several lines, comments, other fields; whether it is a token."""
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
            self.error = self.error or _clean(payload)
            return False
        if not payload.startswith(b"{"):
            raise SseError("an event holds no JSON object")
        if _SPECIAL.search(payload) is not None:
            self._learn(payload)
        return not self.error and _TOKEN.search(payload) is not None

    def _learn(self, payload: bytes) -> None:
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
