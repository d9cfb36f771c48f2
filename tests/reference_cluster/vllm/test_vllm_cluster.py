"""vLLM's workers over our pool behind the Conductor, against a single vLLM."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from tests.reference_cluster.vllm.served import PROFILE, Served, config_of, wait_until_at_rest
from tests.reference_cluster.vllm.workers import (
    BLOCK,
    CONTROL,
    LENGTHS,
    PROMPTS,
    a_prompt,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]
SOURCES = "vllm:prompt_tokens_by_source_total"


@pytest.fixture(scope="module", params=["shm", "tcp"])
def cluster(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """1P+1D; prefill in chunks of 512."""
    directory = tmp_path_factory.mktemp("cluster")
    (directory / "profile.toml").write_text(PROFILE)
    config = config_of(model, directory / "profile.toml", network={"transport": request.param})
    served = Served(config, directory)
    try:
        yield served.wait()
    finally:
        served.close()


@pytest.fixture(autouse=True)
def all_is_given_back(cluster: Served) -> Iterator[None]:
    """Whatever a test does, all is given back after it."""
    yield
    wait_until_at_rest(cluster)


def test_thirty_prompts_come_out_as_from_a_single_vllm(cluster, single):
    """Up to 8,192 tokens; the decode worker computed none of the whole blocks."""
    for prompt in PROMPTS:
        assert cluster.tokens(prompt) == single[id(prompt)], f"{len(prompt)} tokens"
    spared = sum((length - 1) // BLOCK * BLOCK for length in LENGTHS)
    computed = cluster.count("decode-0", SOURCES, 'source="local_compute"')
    external = cluster.count("decode-0", SOURCES, 'source="external_kv_transfer"')
    local = cluster.count("decode-0", SOURCES, 'source="local_cache_hit"')
    assert (computed, external + local) == (sum(LENGTHS) - spared, spared)
    told = cluster.pool("decode-0")
    assert (told["lost_blocks"], told["loaded_blocks"] * BLOCK) == (0, external)


def test_many_at_once_stream_as_from_a_single_vllm(cluster, single):
    """Eight streams side by side, a token an event."""
    prompts = PROMPTS[10:18]

    def streamed(prompt: list[int]) -> list[list[int]]:
        return list(cluster.stream(prompt, 24))

    with ThreadPoolExecutor(len(prompts)) as threads:
        for prompt, events in zip(prompts, threads.map(streamed, prompts), strict=True):
            assert [token for tokens in events for token in tokens] == single[id(prompt)]
            assert all(len(tokens) == 1 for tokens in events)


def test_what_would_miss_its_slo_is_refused_at_once(cluster):
    """The profile says 66 s for 8,192 tokens, the SLO 100: the second of two has to go."""
    prompts = [a_prompt(300 + i, 8192) for i in range(2)]
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda prompt: cluster.ask(prompt, 2), prompts))
    assert sorted(one.status_code for one in answers) == [200, 429]
    refused = next(one for one in answers if one.status_code == 429)
    assert refused.headers["x-rejection-reason"] == "ttft"


def test_a_client_that_hangs_up_during_the_prefill_is_heard(cluster):
    """The prefill worker aborts, the decode worker never hears of it."""
    computed = cluster.count("decode-0", "vllm:prompt_tokens_total")
    body = {"prompt": a_prompt(310, 8192), "max_tokens": 100, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        cluster.http.post("/v1/completions", json=body, timeout=0.3)
    wait_until_at_rest(cluster)
    assert cluster.count("decode-0", "vllm:prompt_tokens_total") == computed


def test_a_client_that_hangs_up_during_the_answer_is_heard(cluster):
    """The decode worker aborts, long before the last token."""
    before = cluster.count("decode-0", "vllm:generation_tokens_total")
    events = cluster.stream(a_prompt(311, 700), 4000)
    assert [len(next(events)) for _ in range(3)] == [1, 1, 1]
    events.close()
    wait_until_at_rest(cluster)
    assert cluster.count("decode-0", "vllm:generation_tokens_total") - before < 2000


@pytest.mark.parametrize("cluster", ["tcp"], indirect=True)
def test_a_prompt_waits_for_another_when_its_prefill_worker_hangs(cluster, single):
    """The Conductor kills it, the supervisor starts another, which gets the prompt."""
    prompt, before = PROMPTS[LENGTHS.index(2048)], cluster.row("prefill-0")
    os.kill(before["pid"], signal.SIGSTOP)
    assert cluster.tokens(prompt) == single[id(prompt)]
    after = cluster.row("prefill-0")
    assert (after["starts"], after["pid"] != before["pid"]) == (before["starts"] + 1, True)


@pytest.mark.parametrize("cluster", ["tcp"], indirect=True)
def test_a_prompt_is_placed_again_when_its_prefill_worker_is_killed(cluster):
    """In the midst of the prefill; by the worker that is started instead."""
    prompt, before = a_prompt(320, 8192), cluster.row("prefill-0")
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(cluster.tokens, prompt)
        while not cluster.count("prefill-0", "vllm:num_requests_running"):
            assert not answer.done(), "killed too late to tell anything"
        os.kill(before["pid"], signal.SIGKILL)
        assert answer.result() == cluster.tokens(prompt)
    assert cluster.row("prefill-0")["starts"] == before["starts"] + 1


@pytest.mark.parametrize("cluster", ["tcp"], indirect=True)
def test_a_stream_goes_on_after_its_decode_worker_was_killed(cluster):
    """Its next tokens come from the worker that was started instead."""
    prompt, before = CONTROL[3], cluster.row("decode-0")
    events = cluster.stream(prompt, 120)
    tokens = [token for _ in range(20) for token in next(events)]
    os.kill(before["pid"], signal.SIGKILL)
    tokens += [token for event in events for token in event]
    assert tokens == cluster.tokens(prompt, 120)
    assert cluster.row("decode-0")["starts"] == before["starts"] + 1


@pytest.mark.parametrize("cluster", ["tcp"], indirect=True)
def test_an_answer_comes_though_the_prefill_worker_is_killed_behind_it(cluster, single):
    """Its blocks were fetched before: the decode worker goes on alone."""
    prompt, pid = CONTROL[2], cluster.row("prefill-0")["pid"]
    events = cluster.stream(prompt, 24)
    tokens = next(events)
    os.kill(pid, signal.SIGKILL)
    assert [*tokens, *(token for event in events for token in event)] == single[id(prompt)]
