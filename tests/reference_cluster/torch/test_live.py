"""Does a live cluster of torch engines say over HTTP what one engine alone says?"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")

import msgspec  # noqa: E402

from reference_cluster.config import ClusterConfig  # noqa: E402
from reference_cluster.cost_model import load_profile  # noqa: E402
from reference_cluster.engines.torch.replica import ReplicaConfig, build_runner  # noqa: E402
from reference_cluster.engines.torch.scheduler import Scheduler  # noqa: E402
from reference_cluster.request import Sampling  # noqa: E402
from tests.reference_cluster.live import live, wait_until  # noqa: E402

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
        "network": {"transport": "shm", "verify": "always"},
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


def spoken(prompt: Sequence[int], sampling: Sampling) -> list[str]:
    """What one engine alone says, a token a piece."""
    scheduler = Scheduler(build_runner(ReplicaConfig(page_tokens=16, kv_tokens=4096)))
    job = scheduler.add(0, prompt, sampling)
    scheduler.run_all()
    return [f" {token}" for token in job.tokens.produced]


def pieces(stream: str) -> list[dict[str, Any]]:
    """The choices of a stream's events, in order."""
    lines = [line[6:] for line in stream.split("\n\n") if line.startswith("data: {")]
    choices: list[dict[str, Any]] = [msgspec.json.decode(line)["choices"][0] for line in lines]
    return choices


def alone(prompts: Sequence[Sequence[int]], device: str = "cpu") -> list[str]:
    config = ReplicaConfig(device=device, page_tokens=16, kv_tokens=8192)
    scheduler = Scheduler(build_runner(config))
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
def test_the_cluster_says_what_one_engine_says(
    system: str, prefill: int, decode: int, device: str
) -> None:
    """Prefix hits, chunks, hand-overs between processes: not one token changes."""
    prompts = make_prompts(16)
    counts = {"prefill_instances": prefill or 1, "decode_instances": decode or 1}
    # The weights of a seed are others on another device.
    engine = {"kind": "torch", "kv_tokens": 16384, "page_tokens": 32, "device": device}
    config = a_config(system=system, engine=engine, **counts)
    # Random weights know no words: ids from 3 on stand for themselves less 3.
    asked = [[token - 3 for token in prompt] for prompt in prompts]
    with live(config, load_profile("tiny-torch-cpu")) as (client, _):

        def ask(prompt: list[int]) -> dict[str, Any]:
            body = {"prompt": prompt, "max_tokens": OUTPUT, "ignore_eos": True}
            response = client.post("/v1/completions", json=body, timeout=60.0)
            assert response.status_code == 200, response.text
            answer: dict[str, Any] = response.json()
            return answer

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, asked))
        assert [answer["choices"][0]["text"] for answer in answers] == alone(prompts, device)
        again = ask(asked[-1])
        assert again["choices"] == answers[-1]["choices"]
        cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == (len(asked[-1]) - 1 if system == "disaggregated" else 0)


def ask_all(client: httpx.Client, prompts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """One after another; ids from 3 on stand for themselves less 3."""
    answers = []
    for prompt in prompts:
        body = {"prompt": [token - 3 for token in prompt], "max_tokens": OUTPUT}
        response = client.post("/v1/completions", json={**body, "ignore_eos": True}, timeout=60.0)
        assert response.status_code == 200, response.text
        answers.append(response.json())
    return answers


def said(answers: Sequence[dict[str, Any]]) -> list[str]:
    return [answer["choices"][0]["text"] for answer in answers]


def counted(client: httpx.Client, count: str) -> float:
    return float(sum(row.get(count, 0) for row in client.get("/cluster/info").json()["workers"]))


def test_every_block_is_verified_where_it_decodes() -> None:
    """By its sender's checksum, reused ones too: nobody else knows what a model computes."""
    prompts = make_prompts(6)
    blocks = sum(-(-len(prompt) // 64) for prompt in prompts)
    with live(a_config(), load_profile("tiny-torch-cpu")) as (client, _):
        ask_all(client, prompts)
        wait_until(lambda: counted(client, "verified_blocks") == blocks)
        assert counted(client, "mismatched_blocks") == 0


def test_ranks_of_a_tensor_parallel_worker_say_what_one_engine_says() -> None:
    """Two processes an instance, each with half of the heads: the same tokens, the same bytes."""
    prompts = make_prompts(6)
    engine = {"kind": "torch", "kv_tokens": 16384, "page_tokens": 32, "tensor_parallel": 2}
    with live(a_config(engine=engine), load_profile("tiny-torch-cpu")) as (client, _):
        assert said(ask_all(client, prompts)) == alone(prompts)
        assert counted(client, "mismatched_blocks") == 0


def test_colocated_prefixes_are_shared_in_device_memory() -> None:
    """Conversations on one instance, some at once, with room for a few: the same tokens.

    Whole blocks are shared, and the last token of a prompt is computed in a block of its own.
    """
    prompts = make_prompts(12)
    colocated = {"device_tokens": 2048, "batching": "chunked", "step_tokens_max": 400}
    config = a_config(system="colocated", colocated={**colocated, "prefix_caching": True})
    with live(config, load_profile("tiny-torch-cpu")) as (client, _):
        with ThreadPoolExecutor(4) as pool:
            twice = [*prompts, *prompts]
            answers = list(pool.map(lambda prompt: ask_all(client, [prompt])[0], twice))
        again = ask_all(client, prompts[-1:])[0]
    wanted = alone(prompts)
    assert said(answers) == [*wanted, *wanted]
    assert said([again]) == wanted[-1:]
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == (len(prompts[-1]) - 1) // 64 * 64


def test_what_the_pool_lets_go_comes_back_from_its_file(tmp_path: Path) -> None:
    """DRAM for 1,024 tokens, prompts of 700: the first is asked again when it has sunk to SSD."""
    numbers = random.Random(7)
    prompts = [[numbers.randrange(3, 4096) for _ in range(700)] for _ in range(4)]
    prefill = {"dram_tokens": 1024, "chunk_tokens": 256, "ssd_tokens": 32768}
    pool = {"working_tokens": 16384, "ssd_directory": str(tmp_path)}
    config = a_config(prefill=prefill, pool=pool)
    with live(config, load_profile("tiny-torch-cpu")) as (client, _):
        answers = ask_all(client, [*prompts, prompts[0]])
    assert said(answers) == alone([*prompts, prompts[0]])
    assert answers[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 699


def test_one_token_and_streams(tmp_path: object) -> None:
    """An answer of one token ends with its prefill; a stream has one event a token."""
    prompt = make_prompts(1)[0]
    with live(a_config(), load_profile("tiny-torch-cpu")) as (client, _):
        body = {"prompt": [token - 3 for token in prompt], "max_tokens": 1, "ignore_eos": True}
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


@pytest.mark.parametrize("system", ["disaggregated", "colocated"])
def test_a_request_says_how_its_tokens_are_drawn_and_when_they_end(system: str) -> None:
    """Seeds, stop strings, end tokens: as one engine alone, whole and streamed; and why it ended.

    The string may be completed by the first token, which no decode instance computes.
    """
    prompt = [9, 8, 7]
    drawn = spoken(prompt, Sampling(8, 0.9, 0.8, seed=5, ignore_eos=True))
    ended = spoken(prompt, Sampling(12, 2.0, seed=318))
    assert ended[-1] == " 1"
    assert len(ended) < 12
    seeded = {"max_tokens": 8, "temperature": 0.9, "top_p": 0.8, "seed": 5, "ignore_eos": True}
    later = drawn[3] + drawn[4]
    cases: list[tuple[dict[str, Any], Sequence[str], int, str]] = [
        (seeded, drawn, 8, "length"),
        ({**seeded, "stop": [later, "never"]}, drawn[:3], 5, "stop"),
        ({**seeded, "stop": drawn[0]}, [], 1, "stop"),
        ({"max_tokens": 12, "temperature": 2, "seed": 318}, ended, len(ended), "stop"),
    ]
    with live(a_config(system=system), load_profile("tiny-torch-cpu")) as (client, _):
        for more, wanted, count, reason in cases:
            body = {"prompt": [token - 3 for token in prompt], **more}
            answer = client.post("/v1/completions", json=body, timeout=60.0).json()
            assert answer["choices"][0]["text"] == "".join(wanted)
            assert answer["choices"][0]["finish_reason"] == reason
            assert answer["usage"]["completion_tokens"] == count
            streamed = client.post("/v1/completions", json={**body, "stream": True}).text
            found = pieces(streamed)
            assert "".join(one["text"] for one in found) == "".join(wanted)
            assert [one["finish_reason"] for one in found] == [None] * (count - 1) + [reason]


def test_a_drawn_answer_goes_on_alike_after_a_loss() -> None:
    """Its decode worker is killed: the other one draws the tokens that the first would have,
    and finds the stop string."""
    drawn = spoken([9, 8, 7], Sampling(600, 1.0, seed=6, ignore_eos=True))
    body = {"prompt": [6, 5, 4], "max_tokens": 600, "temperature": 1, "seed": 6}
    body |= {"ignore_eos": True, "stream": True, "stop": "".join(drawn[590:593])}
    config = a_config(
        decode_instances=2, workers={"heartbeat_s": 0.1, "dead_after_s": 1.0, "restart": False}
    )
    started = threading.Event()

    with live(config, load_profile("tiny-torch-cpu")) as (client, front):

        def read() -> str:
            text = ""
            with client.stream("POST", "/v1/completions", json=body, timeout=60.0) as answer:
                for part in answer.iter_text():
                    text += part
                    started.set()
            return text

        with ThreadPoolExecutor(1) as pool:
            text = pool.submit(read)
            assert started.wait(30.0)
            name = next(one.name for one in front.cluster.decode if one.expected or one.batch.size)
            rows = {row["name"]: row for row in client.get("/cluster/info").json()["workers"]}
            os.kill(rows[name]["pid"], signal.SIGKILL)
            found = pieces(text.result(60.0))
        assert front.cluster.recovery.counts["resumed"] == 1
    assert "".join(one["text"] for one in found) == "".join(drawn[:590])
    assert found[-1]["finish_reason"] == "stop"
