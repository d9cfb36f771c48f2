"""How does a prompt of 126,000 tokens become bytes without delaying anybody's send?

A thread builds whole HTTP requests ahead, in order of release, within a bound of bytes. It works in
slices of a few thousand tokens and lets go of the interpreter between them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from mooncake_bench.replay.schedule import Plan
from mooncake_bench.replay.tokenized import TokenizedWords
from workloads.prompts import FIRST_TOKEN, VOCABULARY, prompt_text, prompt_token_ids

AHEAD_BYTES, CLOSED_AHEAD_BYTES = 3 << 20, 128 << 20
"""How far ahead is enough: an open loop knows its pace; a closed one may outrun the builder."""
SLICE_TOKENS = 4096
_DIGITS = [b"%d" % token for token in range(FIRST_TOKEN + VOCABULARY)]


@dataclass(frozen=True, slots=True)
class RequestShape:
    """What every request of a run has in common."""

    host: str
    path: str
    model: str
    trace_key: str
    block_tokens: int
    is_chat: bool
    sends_tokens: bool
    wants_timeline: bool
    authorization: dict[str, str] = field(default_factory=dict)
    """The header with the endpoint's token, or nothing."""
    salt: str = ""
    """Put before literal prompts; those made of block ids have it in `trace_key`."""
    cache_salt: str = ""
    """Sent under this name (vLLM keeps caches of different salts apart); "" for none."""
    slo_headers: dict[str | None, str] = field(default_factory=dict)
    """Header lines with the bounds of each class; None is the key of all others."""
    words: TokenizedWords | None = None
    """Words by the target's tokenizer, for text prompts of exact length."""


class RequestBuilder:
    """Makes the bytes of one request: head and body, ready to be written."""

    def __init__(self, shape: RequestShape, plan: Plan) -> None:
        self._shape = shape
        self._plan = plan
        self._rest = 0
        """Tokens since the last rest."""
        self._short: dict[int, list[int]] = {}
        """Prompts of one block by row, made together: alone each costs as much as sending it."""

    def build(self, row: int) -> bytes:
        """The HTTP request of the row at this position of the plan."""
        shape = self._shape
        literal = self._plan.prompts[row] if self._plan.prompts is not None else None
        if literal is not None:
            return self._with_head(row, self._literal(literal), self._settings(row))
        prompt = self._token_prompt(row) if shape.sends_tokens else self._text_prompt(row)
        key = b'"messages":[{"role":"user","content":' if shape.is_chat else b'"prompt":'
        closing = b"}]" if shape.is_chat else b""
        return self._with_head(row, b"".join([key, prompt, closing]), self._settings(row))

    def _with_head(self, row: int, prompt: bytes, settings: bytes) -> bytes:
        # The settings follow the prompt: the opening brace of their own object is dropped.
        body = b"".join([b"{", prompt, b",", settings[1:]])
        return self._head(row, len(body)) + body

    def _literal(self, literal: str) -> bytes:
        """The member `prompt` or `messages` of a prompt that the trace gives as JSON."""
        value = salted(msgspec.json.decode(literal), self._shape.salt)
        if self._shape.is_chat:
            chat = [{"role": "user", "content": value}] if isinstance(value, str) else value
            return b'"messages":' + msgspec.json.encode(chat)
        return b'"prompt":' + msgspec.json.encode(value)

    def _settings(self, row: int) -> bytes:
        stream: dict[str, bool] = {"include_usage": True}
        if self._shape.wants_timeline:
            stream["include_timeline"] = True
        settings: dict[str, Any] = {
            "model": self._shape.model,
            "max_tokens": int(self._plan.output_tokens[row]),
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": stream,
        }
        if self._shape.cache_salt:
            settings["cache_salt"] = self._shape.cache_salt
        return msgspec.json.encode(settings)

    def _head(self, row: int, length: int) -> bytes:
        extra = "".join(f"{key}: {value}\r\n" for key, value in self._shape.authorization.items())
        if bounds := self._shape.slo_headers:
            name = self._plan.classes[row] if self._plan.classes is not None else None
            extra += bounds.get(name, bounds[None])
        return (
            f"POST {self._shape.path} HTTP/1.1\r\nHost: {self._shape.host}\r\n"
            f"Content-Type: application/json\r\nAccept: text/event-stream\r\n{extra}"
            f"X-Request-Id: {self._plan.request[row]}\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    def _token_prompt(self, row: int) -> bytes:
        pieces = [
            b",".join(map(_DIGITS.__getitem__, tokens))
            for tokens in self._short_prompt(row) or self._slices(row, prompt_token_ids)
        ]
        return b"[" + b",".join(pieces) + b"]"

    def _short_prompt(self, row: int) -> list[list[int]]:
        """The only slice of a prompt of one block; [] of any other."""
        length = int(self._plan.input_tokens[row])
        if not 0 < length <= self._shape.block_tokens:
            return []
        if row not in self._short:
            self._short = self._short_prompts(row, length)
            time.sleep(0)
        return [self._short.pop(row)] if row in self._short else []

    def _short_prompts(self, row: int, length: int) -> dict[int, list[int]]:
        """Those of this row and of the next ones, if they are no longer than `length`."""
        lengths = self._plan.input_tokens[row : row + max(1, SLICE_TOKENS // length)]
        rows = row + np.flatnonzero((lengths > 0) & (lengths <= length))
        blocks = self._plan.hash_ids.gather(rows).to_list()
        if any(len(ids) != 1 for ids in blocks):
            return {}
        # A block's tokens depend on its id alone, so these are one prompt of so many blocks.
        first = [ids[0] for ids in blocks]
        tokens = prompt_token_ids(self._shape.trace_key, first, len(rows) * length, length)
        starts = zip(range(0, len(tokens), length), rows.tolist(), strict=True)
        return {one: tokens[at : at + int(lengths[one - row])] for at, one in starts}

    def _text_prompt(self, row: int) -> bytes:
        if (words := self._shape.words) is not None:
            tokens = [one for part in self._slices(row, prompt_token_ids) for one in part]
            return msgspec.json.encode(words.text(tokens))
        # The words are letters: nothing in them needs escaping.
        return b'"' + " ".join(self._slices(row, prompt_text)).encode() + b'"'

    def _slices(self, row: int, make: Callable[[str, Sequence[Any], int, int], Any]) -> list[Any]:
        shape, blocks = self._shape, self._plan.blocks(row)
        left = int(self._plan.input_tokens[row])
        step = max(1, SLICE_TOKENS // shape.block_tokens)
        slices = []
        for start in range(0, len(blocks), step):
            tokens = min(left, step * shape.block_tokens)
            part = blocks[start : start + step]
            slices.append(make(shape.trace_key, part, tokens, shape.block_tokens))
            left -= tokens
            self._rest += max(tokens, shape.block_tokens)
            if self._rest >= SLICE_TOKENS:
                self._rest = 0
                time.sleep(0)  # Whoever has a send to make now gets the interpreter.
        return slices


def salted(prompt: Any, salt: str) -> Any:
    """A literal prompt (text, or messages) with the salt as its first line."""
    if not salt:
        return prompt
    if isinstance(prompt, str):
        return f"{salt}\n{prompt}"
    first, *others = prompt
    return [{**first, "content": f"{salt}\n{first.get('content') or ''}"}, *others]


class BuildAhead:
    """Builds the requests of a plan in order, at most `ahead_bytes` ahead of those taken.

    One that is asked for out of order, as the next turn of a session, is built at once.
    """

    def __init__(self, build: Callable[[int], bytes], rows: int, ahead_bytes: int) -> None:
        self._build = build
        self._rows = rows
        self._ahead_bytes = ahead_bytes
        self._ready: dict[int, bytes] = {}
        self._asked: deque[int] = deque()
        # One counter a thread: `+=` on a shared one could lose an update.
        self._built_bytes = 0
        self._taken_bytes = 0
        self._changed = threading.Condition()
        self._is_waiting = False
        self._is_stopped = False
        self.error: Exception | None = None
        self.is_warm = threading.Event()
        """Set once the window is full, or everything is built, or building failed."""
        self._thread = threading.Thread(target=self._run, name="build-requests", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread and forget what was not taken."""
        with self._changed:
            self._is_stopped = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def take(self, row: int) -> bytes | None:
        """The request of the row, once; None while it is not built: ask again."""
        request = self._ready.pop(row, None)
        if request is None:
            if row not in self._asked:
                self._asked.append(row)
        else:
            self._taken_bytes += len(request)
        # Unlocked on purpose: the sender never waits for the builder.
        if self._is_waiting and self._changed.acquire(blocking=False):
            self._changed.notify_all()
            self._changed.release()
        return request

    def _is_full(self) -> bool:
        return self._built_bytes - self._taken_bytes >= self._ahead_bytes

    def _run(self) -> None:
        early: set[int] = set()
        try:
            for row in range(self._rows):
                self._wait_for_room(row, early)
                if self._is_stopped:
                    return
                if row not in early:
                    self._add(row)
        except Exception as error:  # noqa: BLE001  # handed to the sender, who raises it
            self.error = error
        finally:
            self.is_warm.set()

    def _wait_for_room(self, next_row: int, early: set[int]) -> None:
        """Return when the next row in order may be built; build what is asked for meanwhile."""
        while not self._is_stopped:
            while self._asked:
                row = self._asked.popleft()
                # Smaller rows are built already: the question came too soon.
                if row >= next_row and row not in early:
                    early.add(row)
                    self._add(row)
            if not self._is_full():
                return
            self.is_warm.set()
            with self._changed:
                self._is_waiting = True
                # The time limit makes up for a notification that `take` could not give.
                self._changed.wait(0.05)
                self._is_waiting = False

    def _add(self, row: int) -> None:
        request = self._build(row)
        self._built_bytes += len(request)
        self._ready[row] = request
