"""Where do the tests find traces, and how do they make small ones?"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workloads.trace import Trace, read_trace

REPO = Path(__file__).resolve().parents[2]


def trace_file(name: str) -> Path:
    """A public trace on this machine (MOONCAKE_TRACES), or a skip that says what is missing."""
    directory = Path(os.environ.get("MOONCAKE_TRACES", REPO / ".." / "shared" / "traces"))
    path = directory / name
    if not path.is_file():
        pytest.skip(f"{name} is not here: set MOONCAKE_TRACES to the directory that holds it")
    return path


@pytest.fixture(scope="session")
def conversation_file() -> Path:
    """Mooncake's conversation trace as a file."""
    return trace_file("conversation_trace.jsonl")


@pytest.fixture(scope="session")
def conversation(conversation_file: Path) -> Trace:
    """Mooncake's conversation trace, whole."""
    return read_trace(conversation_file)


@pytest.fixture(scope="session")
def azure_file() -> Path:
    """Azure's conversation trace."""
    return trace_file("AzureLLMInferenceTrace_conv.csv")


Write = Callable[..., Path]


def row(timestamp: float = 0, tokens: int = 600, output: int = 5, ids: Any = (1, 2)) -> str:
    """One line of Mooncake JSONL."""
    values = {"timestamp": timestamp, "input_length": tokens, "output_length": output}
    return json.dumps(values | {"hash_ids": list(ids)})


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes lines (or bytes) to a file and returns its path."""

    def write_lines(*lines: str | bytes, name: str = "trace.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(
            b"\n".join(line.encode() if isinstance(line, str) else line for line in lines)
        )
        return path

    return write_lines


@pytest.fixture
def make_row() -> Callable[..., str]:
    """`row`, for tests."""
    return row


@pytest.fixture
def make_trace(write: Write) -> Callable[..., Trace]:
    """A trace from (timestamp ms, input tokens, ids) triples, output 5 each."""

    def make(*rows: tuple[float, int, list[Any]]) -> Trace:
        return read_trace(write(*(row(time, tokens, 5, ids) for time, tokens, ids in rows)))

    return make
