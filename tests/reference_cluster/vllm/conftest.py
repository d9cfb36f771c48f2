"""What the tests with a real vLLM have in common: a tiny model, and what one vLLM alone says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reference_cluster.vllm.workers import (
    CONTROL,
    CROWD,
    PAYLOAD_BYTES,
    PROMPTS,
    Worker,
    running,
    save_tiny_model,
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def single(model: Path) -> dict[int, list[int]]:
    """What one vLLM without any connector answers, by the prompt's object."""
    worker = Worker(model, kv_bytes=256 * PAYLOAD_BYTES)
    with running(worker):
        return {id(one): worker.tokens(one) for one in (*PROMPTS, *CROWD, *CONTROL)}
