"""What do files of real prompts say? ShareGPT-like conversations, and prompts a line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from workloads.errors import TraceError
from workloads.model import Trace, blocks_of, build_frame

PROMPT_KEYS = (b'"prompt"', b'"messages"', b'"text_input"')
BYTES_PER_TOKEN = 4
"""Of English text, roughly; lengths are estimates, and said to be."""
DEFAULT_OUTPUT_TOKENS = 128
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"chatgpt": "assistant", "bard": "assistant", "bing": "assistant", "system": "system"}
ESTIMATED = "input tokens estimated at 4 bytes each"


@dataclass(slots=True)
class _Requests:
    """Columns as they grow, one entry a request."""

    arrival_s: list[float] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)
    prompt: list[Any] = field(default_factory=list)
    session: list[str | None] = field(default_factory=list)
    delay_s: list[float | None] = field(default_factory=list)
    kind: list[str | None] = field(default_factory=list)

    def trace(self, name: str, data: bytes, block_tokens: int, *notes: str) -> Trace:
        """The requests in order of arrival; ids from the texts, so that shared prefixes are."""
        order = sorted(range(len(self.prompt)), key=lambda row: self.arrival_s[row])
        said = [_plain(self.prompt[row]) for row in order]
        tokens = np.array([max(1, blocks_of(len(one), BYTES_PER_TOKEN)) for one in said])
        blocks = blocks_of(tokens, block_tokens)
        ids = [one for text in said for one in _chain(text, block_tokens * BYTES_PER_TOKEN)]
        frame = build_frame(
            [self.arrival_s[row] for row in order],
            tokens,
            [self.output_tokens[row] for row in order],
            pl.Series(ids, dtype=pl.Int64),
            blocks,
            {
                "session": [self.session[row] for row in order],
                "delay_s": [self.delay_s[row] for row in order],
                "class": [self.kind[row] for row in order],
                "prompt": [msgspec.json.encode(self.prompt[row]).decode() for row in order],
            },
        )
        digest = hashlib.sha256(data).hexdigest()
        return Trace(frame, name, digest, block_tokens, False, (ESTIMATED, *notes))


def read_prompts(
    data: bytes, path: Path, block_tokens: int = 512, timestamp_unit: str | None = None
) -> Trace:
    """A trace from JSON lines with `prompt` (or `text_input`), or `messages` as OpenAI's chat has.

    Optional: output_length (128), timestamp (ms; without any all arrive at 0: choose arrivals),
    session_id with delay (ms after the previous turn's end), class. Raises TraceError.
    """
    found = _Requests()
    per_second = 1.0 if timestamp_unit == "s" else 1e3
    latest: dict[str, float] = {}
    filled = ((number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip())
    is_timed = False
    for number, line in filled:
        row = _object(line, f"{path}:{number}")
        prompt = row.get("messages", row.get("prompt", row.get("text_input")))
        _check_prompt(prompt, f"{path}:{number}")
        session = None if row.get("session_id") is None else str(row["session_id"])
        delay = _amount(row, "delay", None, f"{path}:{number}")
        before = latest.get(session, 0.0) if session is not None else 0.0
        stamp = _amount(row, "timestamp", None, f"{path}:{number}")
        is_timed |= stamp is not None
        at = stamp / per_second if stamp is not None else before
        if session is not None:
            latest[session] = at
        length = row.get("output_length", row.get("output_tokens", row.get("max_tokens")))
        found.arrival_s.append(round(at * 1e9) / 1e9)
        found.output_tokens.append(_length(length, f"{path}:{number}"))
        found.prompt.append(prompt)
        found.session.append(session)
        found.delay_s.append(None if delay is None else delay / per_second)
        found.kind.append(None if row.get("class") is None else str(row["class"]))
    notes = () if is_timed else ("no timestamps: all at 0 s",)
    return found.trace(path.stem, data, block_tokens, *notes)


def read_conversations(data: bytes, path: Path, block_tokens: int = 512) -> Trace:
    """A trace from ShareGPT's JSON: [{"id", "conversations": [{"from", "value"}]}].

    Each message of a human is a request with all that was said before it, answers as the file has
    them; it waits for the answer to the one before. The answer's length is the output asked for.
    All conversations begin at 0 s: choose arrivals, or a closed loop. Raises TraceError.
    """
    try:
        items = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: not valid JSON ({error}); mend the file") from None
    found = _Requests()
    for number, item in enumerate(items):
        place = f"{path}: conversation {number}"
        turns = item.get("conversations", item.get("messages")) if isinstance(item, dict) else None
        if not isinstance(turns, list):
            raise TraceError(f'{place}: no "conversations"; give a list of {{"from", "value"}}')
        _add_turns(found, _messages(turns, place), str(item.get("id", number)))
    if not found.prompt:
        raise TraceError(f"{path}: nobody says anything; give conversations with human turns")
    return found.trace(path.stem, data, block_tokens, "no timestamps: all at 0 s")


def _add_turns(found: _Requests, messages: list[dict[str, str]], session: str) -> None:
    is_first = True
    for end, message in enumerate(messages, 1):
        if message["role"] != "user":
            continue
        answer = messages[end]["content"] if end < len(messages) else ""
        found.arrival_s.append(0.0)
        found.output_tokens.append(
            max(1, blocks_of(len(answer.encode()), BYTES_PER_TOKEN))
            if answer
            else DEFAULT_OUTPUT_TOKENS
        )
        found.prompt.append(messages[:end])
        found.session.append(session)
        found.delay_s.append(None if is_first else 0.0)
        found.kind.append(None)
        is_first = False


def _messages(turns: list[Any], place: str) -> list[dict[str, str]]:
    messages = []
    for turn in turns:
        who = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        said = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if who not in ROLES or not isinstance(said, str):
            raise TraceError(
                f'{place}: a turn is no {{"from", "value"}} of {", ".join(ROLES)}; mend it'
            )
        messages.append({"role": ROLES[who], "content": said})
    return messages


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise TraceError(f"{place}: not valid JSON; give one complete object a line") from None
    if not isinstance(row, dict):
        raise TraceError(f'{place}: no object; give {{"prompt": ...}} or {{"messages": ...}}')
    return row


def _check_prompt(prompt: Any, place: str) -> None:
    if isinstance(prompt, str) and prompt:
        return
    if (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in prompt)
    ):
        return
    raise TraceError(
        f"{place}: no prompt; give a text as prompt, or messages with role and content"
    )


def _amount(row: dict[str, Any], name: str, default: float | None, place: str) -> float | None:
    value = row.get(name, default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise TraceError(f"{place}: {name} is {str(value)[:40]!r}; give milliseconds, 0 or more")
    return float(value)


def _length(value: Any, place: str) -> int:
    if value is None:
        return DEFAULT_OUTPUT_TOKENS
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TraceError(f"{place}: output_length is {str(value)[:40]!r}; give 1 token or more")
    return value


def _plain(prompt: Any) -> bytes:
    """The prompt as bytes that begin alike where the prompts do."""
    if isinstance(prompt, str):
        return prompt.encode()
    return b"".join(f"{one['role']}: {one.get('content') or ''}\n".encode() for one in prompt)


def _chain(text: bytes, size: int) -> Iterable[int]:
    """An id for each block of `size` bytes, from it and all before it."""
    state = hashlib.blake2b(digest_size=8)
    for start in range(0, max(1, len(text)), size):
        state.update(text[start : start + size])
        # A block that is cut is another block than the whole one.
        whole = state.copy()
        whole.update(b"%d" % min(len(text), start + size))
        yield int.from_bytes(whole.digest(), "little") >> 1
