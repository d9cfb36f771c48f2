"""Which bytes of a stream are tokens, which are usage, an error, or the end?

A token is an event whose delta holds content, text or reasoning content. Keys are found on the
bytes: in JSON a quote inside a string is escaped, so `"text"` followed by a colon is always a key.
JSON is decoded only for events with usage, a timeline or an error in them.
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

    __slots__ = ("_held", "_held_return", "error", "is_done", "timeline", "usage")

    def __init__(self) -> None:
        self.is_done = False
        """`[DONE]` was seen; later events are ignored."""
        self.error = ""
        self.usage: dict[str, Any] = {}
        self.timeline: dict[str, Any] = {}
        self._held = b""
        self._held_return = False

    def feed(self, data: bytes) -> int:
        """How many token events `data` completes; raises SseError."""
        if self._held_return or b"\r" in data:
            data = self._with_newlines(data)
        if self._held:
            data = self._held + data
        end = data.rfind(b"\n\n")
        self._held = data if end < 0 else data[end + 2 :]
        if len(self._held) > MAX_EVENT_BYTES:
            raise SseError(f"an event is longer than {MAX_EVENT_BYTES} bytes")
        return 0 if end < 0 else self._take(data[:end])

    def close(self) -> int:
        """The body has ended, perhaps without the last blank line; as `feed`."""
        rest, self._held = self._held, b""
        if self._held_return:
            self._held_return = False
            rest += b"\n"
        return self._take(rest) if rest.strip() else 0

    def _with_newlines(self, data: bytes) -> bytes:
        """`data` with every line end as a newline; a last `\\r` waits for what follows it."""
        if self._held_return:
            data = b"\r" + data
        self._held_return = data.endswith(b"\r")
        if self._held_return:
            data = data[:-1]
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _take(self, events: bytes) -> int:
        is_plain = _SPECIAL.search(events) is None
        tokens = 0
        for event in events.split(b"\n\n"):
            if self.is_done:
                break
            if is_plain and event.startswith(b"data: {") and b"\n" not in event:
                tokens += _TOKEN.search(event) is not None
            else:
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
