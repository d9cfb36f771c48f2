"""Does a live cluster of torch engines say over HTTP what one engine alone says?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")

import msgspec  # noqa: E402

from reference_cluster.config import ClusterConfig  # noqa: E402
from reference_cluster.cost_model import load_profile  # noqa: E402
from reference_cluster.engines.torch.replica import ReplicaConfig, build_runner  # noqa: E402
from reference_cluster.engines.torch.sampling import Sampling  # noqa: E402
from reference_cluster.engines.torch.scheduler import Scheduler  # noqa: E402
from tests.reference_cluster.live import live  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.live]
OUTPUT = 6


def a_config(**fields: Any) -> ClusterConfig:
    given: dict[str, Any] = {
        "profile": "tiny-torch-cpu",
        "block_tokens": 64,
        "prefill_instances": 1,
        "decode_instances": 1,
        "colocated_instances": 1,
        "prefill": {"dram_tokens": 32768, "chunk_tokens": 256},
        "pool": {"working_tokens": 16384},
        "network": {"transport": "shm"},
        "engine": {"kind": "torch", "kv_tokens": 16384, "page_tokens": 32},
        "colocated": {"device_tokens": 8192, "batching": "chunked", "step_tokens_max": 400},
        "slo": {"ttft_s": 60.0, "tbt_s": 5.0},
    }
    return msgspec.convert({**given, **fields}, ClusterConfig)


def make_prompts(count: int) -> list[list[int]]:
    """Conversations: every other prompt goes on where the one before ended."""
    numbers = random.Random(4)
    prompts: list[list[int]] = []
    for number in range(count):
        fresh = [
            numbers.randrange(3, 4096) for _ in range(numbers.choice([1, 63, 64, 65, 300, 700]))
        ]
        prompts.append([*prompts[-1], *fresh] if number % 2 else fresh)
    return prompts


def alone(prompts: Sequence[Sequence[int]]) -> list[str]:
    scheduler = Scheduler(build_runner(ReplicaConfig(page_tokens=16, kv_tokens=8192)))
    answers = []
    for number, prompt in enumerate(prompts):
        job = scheduler.add(number, prompt, Sampling(OUTPUT, ignore_eos=True))
        scheduler.run_all()
        answers.append("".join(f" {token}" for token in job.tokens.produced))
    return answers


@pytest.mark.parametrize(
    ("system", "prefill", "decode"),
    [("disaggregated", 1, 1), ("disaggregated", 2, 2), ("colocated", 0, 0)],
)
def test_the_cluster_says_what_one_engine_says(system: str, prefill: int, decode: int) -> None:
    """Prefix hits, chunks, hand-overs between processes: not one token changes."""
    prompts = make_prompts(16)
    counts = {"prefill_instances": prefill or 1, "decode_instances": decode or 1}
    config = a_config(system=system, **counts)
    # Random weights know no words: ids from 3 on stand for themselves less 3.
    asked = [[token - 3 for token in prompt] for prompt in prompts]
    with live(config, load_profile("tiny-torch-cpu")) as (client, _):

        def ask(prompt: list[int]) -> dict[str, Any]:
            body = {"prompt": prompt, "max_tokens": OUTPUT}
            response = client.post("/v1/completions", json=body, timeout=60.0)
            assert response.status_code == 200, response.text
            answer: dict[str, Any] = response.json()
            return answer

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, asked))
        assert [answer["choices"][0]["text"] for answer in answers] == alone(prompts)
        again = ask(asked[-1])
        assert again["choices"] == answers[-1]["choices"]
        cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == (len(asked[-1]) - 1 if system == "disaggregated" else 0)


def test_one_token_and_streams(tmp_path: object) -> None:
    """An answer of one token ends with its prefill; a stream has one event a token."""
    prompt = make_prompts(1)[0]
    with live(a_config(), load_profile("tiny-torch-cpu")) as (client, _):
        body = {"prompt": [token - 3 for token in prompt], "max_tokens": 1}
        one = client.post("/v1/completions", json=body).json()
        body |= {"max_tokens": OUTPUT, "stream": True}
        lines = client.post("/v1/completions", json=body).text.split("\n\n")
        assert client.get("/cluster/info").json()["source"] == "live-torch"
    texts = [msgspec.json.decode(line[6:]) for line in lines if line.startswith("data: {")]
    said = [text["choices"][0]["text"] for text in texts if text["choices"]]
    wanted = alone([prompt])[0]
    assert "".join(said) == wanted
    assert len(said) == OUTPUT
    assert one["choices"][0]["text"] == said[0]
