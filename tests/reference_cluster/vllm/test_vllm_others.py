"""Other shapes of clusters of vLLM: colocated, two that prefill, a stock server by its URL."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.reference_cluster.vllm.served import PROFILE, Served, config_of
from tests.reference_cluster.vllm.workers import (
    BLOCK,
    CONTROL,
    PAYLOAD_BYTES,
    PROMPTS,
    START_S,
    a_prompt,
    save_tokenizer,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]


@contextlib.contextmanager
def serving(directory: Path, model: Path, **sections: dict[str, Any]) -> Iterator[Served]:
    """Everything is given back at its end."""
    (directory / "profile.toml").write_text(PROFILE)
    served = Served(config_of(model, directory / "profile.toml", **sections), directory)
    try:
        served.wait()
        yield served
        end_s = time.monotonic() + 60
        while problems := served.problems():
            assert time.monotonic() < end_s, problems
            time.sleep(0.2)
    finally:
        served.close()


def cached_tokens(served: Served, prompt: list[int]) -> int:
    return served.ask(prompt, 2).json()["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize(
    ("batching", "prefix_caching", "cached"),
    [("chunked", True, 1000 // BLOCK * BLOCK), ("prefill-first", False, 0)],
)
def test_a_colocated_worker_does_it_all(tmp_path, model, single, batching, prefix_caching, cached):
    """With and without chunked prefill and prefix caching, as the config says."""
    top = {"system": "colocated", "colocated_instances": 1}
    colocated = {"batching": batching, "prefix_caching": prefix_caching, "step_tokens_max": 512}
    with serving(tmp_path, model, top=top, colocated=colocated) as served:
        for prompt in PROMPTS[:20]:
            assert served.tokens(prompt) == single[id(prompt)]
        fresh = a_prompt(400, 1000)
        assert [cached_tokens(served, fresh) for _ in range(2)] == [0, cached]


def test_a_prefix_is_fetched_from_a_busy_worker(tmp_path, model, single):
    """prefill-0 has computed it and is at work for long: prefill-1 reads it out of its memory."""
    prompt = CONTROL[0]
    with serving(tmp_path, model, top={"prefill_instances": 2}) as served:
        served.tokens(prompt[: 5 * BLOCK + 1], 1)
        holder, other = "prefill-0", "prefill-1"
        if served.pool(other)["held_blocks"]:
            holder, other = other, holder
        assert served.pool(holder)["held_blocks"] == 5
        # The same beginning, so that it goes where that is.
        long = [*prompt[: 5 * BLOCK], *a_prompt(401, 7000)]
        busy = threading.Thread(target=served.ask, args=(long, 1))
        busy.start()
        time.sleep(0.3)
        answer = served.tokens(prompt)
        busy.join()
        assert answer == single[id(prompt)]
        assert served.pool(other)["fetched_bytes"] >= 5 * PAYLOAD_BYTES
        assert served.pool(other)["lost_blocks"] == 0


@pytest.fixture(scope="module")
def speaking(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a tokenizer: token 17 is w17."""
    directory = tmp_path_factory.mktemp("speaking") / "model"
    shutil.copytree(model, directory)
    save_tokenizer(directory)
    return directory


def test_a_model_with_a_tokenizer_speaks(tmp_path, speaking, single):
    """Real words, streamed and whole, up to a stop string."""
    prompt, tokens = PROMPTS[0], single[id(PROMPTS[0])]
    words = [f"w{token}" for token in tokens]
    top = {"system": "colocated", "colocated_instances": 1}
    with serving(tmp_path, speaking, top=top) as served:
        assert served.ask(prompt).json()["choices"][0]["text"].split() == words
        text = " ".join(f"w{token}" for token in prompt)
        stopped = served.ask(text, stop=words[5]).json()["choices"][0]
        assert stopped["text"].split() == words[:5]
        assert stopped["finish_reason"] == "stop"


@pytest.fixture
def stock(speaking: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """vLLM's own API server: its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags: dict[str, Any] = {
        "model": speaking,
        "host": "127.0.0.1",
        "port": port,
        "dtype": "float32",
        "max-model-len": 8448,
        "kv-cache-memory-bytes": 128 * PAYLOAD_BYTES,
    }
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--enforce-eager", "--enable-prompt-tokens-details"]
    words += [f"--{name}={value}" for name, value in flags.items()]
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    process = subprocess.Popen(
        words, env=os.environ | quiet, stdout=subprocess.DEVNULL, start_new_session=True
    )
    url, end_s = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while True:
            assert process.poll() is None, "vLLM's server did not start"
            assert time.monotonic() < end_s, "vLLM's server did not start in time"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.5)
        yield url, process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_stock_server_serves_by_its_url(tmp_path, model, single, stock):
    """Nothing is started; when it ends, clients are told so."""
    url, process = stock
    top = {"system": "colocated", "colocated_instances": 1}
    sections = {"top": top, "vllm": {"urls": [url]}, "slo": {"ttft_s": 5.0}}
    (tmp_path / "profile.toml").write_text(PROFILE.replace("8e-3", "1e-4"))
    served = Served(config_of(model, tmp_path / "profile.toml", **sections), tmp_path)
    try:
        served.wait()
        for prompt in PROMPTS[:12]:
            assert [one for event in served.stream(prompt, 24) for one in event] == single[
                id(prompt)
            ]
        assert served.row("colocated-0")["state"] == "member"
        os.killpg(process.pid, signal.SIGKILL)
        end_s = time.monotonic() + 30
        while served.row("colocated-0")["state"] == "member":
            assert time.monotonic() < end_s
            time.sleep(0.1)
        answer = served.ask(PROMPTS[0])
        assert answer.status_code == 429
        assert answer.headers["x-rejection-reason"] == "no-instance"
    finally:
        served.close()
