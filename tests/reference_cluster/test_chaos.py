"""What do many clients notice while a live cluster is damaged? The long runs are in tests/bench.

Each of these takes seconds and ends with all books balanced and nothing left behind.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.bench.chaos import CONFIG, NAMES, PROFILE, strike_through, trace_rows
from tests.bench.cluster_bytes import carried, wrong
from tests.bench.live_cluster import LiveCluster, serving, write_trace
from tests.faults import schedule
from tests.reference_cluster.live import live, wait_until
from tests.reference_cluster.small import a_config, write_profile
from tests.reference_cluster.test_processes import BYTES, completion, total

pytestmark = [pytest.mark.live, pytest.mark.timeout(120)]


def test_every_request_ends_while_workers_are_killed_and_hang(tmp_path: Path) -> None:
    """20 s, 10 requests a second, four faults; one of them each kind of worker's."""
    faults = schedule(3, NAMES, 4, 4.0, 4.0)
    outcome = strike_through(tmp_path, 3, faults, 10.0, 20.0)
    assert outcome.problems == []
    assert {row["fault"].partition(" ")[0] for row in outcome.rows} == {"kill", "stop"}
    assert outcome.ends.total() == outcome.offered
    assert outcome.ends["finished"] > outcome.offered / 2


# ---- the Conductor ---------------------------------------------------------------------------


async def one(client: httpx.AsyncClient, rng: random.Random) -> str:
    """How one request ends for a client: with all its tokens, or with what."""
    tokens = rng.randint(5, 60)
    prompt = [rng.randrange(1000, 30_000) for _ in range(rng.randint(100, 1200))]
    body = completion(stream=True, max_tokens=tokens, prompt=prompt)
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            text = (await answer.aread()).decode()
    except httpx.TransportError as error:
        return type(error).__name__
    if answer.status_code != 200 or not text.endswith("data: [DONE]\n\n"):
        return f"{answer.status_code} {text[-80:]}"
    return "whole" if text.count('"text":" the"') == tokens else "tokens lost"


async def many(url: str, count: int, every_s: float) -> Counter[str]:
    """A new request every so often; how they end."""
    rng = random.Random(0)
    async with httpx.AsyncClient(base_url=url, timeout=30.0) as client:
        tasks = []
        for _ in range(count):
            tasks.append(asyncio.create_task(one(client, rng)))
            await asyncio.sleep(every_s)
        return Counter(await asyncio.gather(*tasks))


def ends_of(cluster: LiveCluster, strike: Callable[[], object]) -> Counter[str]:
    """How 80 requests in 4 s end for their clients, where `strike` is called after the first."""

    async def main() -> Counter[str]:
        async def striking() -> None:
            await asyncio.sleep(1.0)
            await asyncio.to_thread(strike)

        ends, _ = await asyncio.gather(many(cluster.url, 80, 0.05), striking())
        return ends

    return asyncio.run(main())


@pytest.mark.parametrize("also", [(), ("decode-0", "prefill-1")])
def test_a_conductor_that_is_killed_takes_only_its_connections_along(
    tmp_path: Path, also: tuple[str, ...]
) -> None:
    """Whoever is connected sees the connection end; later requests wait for the next Conductor.
    The workers are the same, but for those killed with it, and hold nothing for requests
    that nobody waits for."""
    profile = write_profile(tmp_path / "chaos.toml", PROFILE)
    leftovers: list[str] = []
    with serving(CONFIG.format(profile=profile), tmp_path, leftovers) as cluster:
        before = {name: row["pid"] for name, row in cluster.workers().items()}
        victims = [cluster.conductor_pid, *(before[name] for name in also)]

        def strike() -> None:
            for pid in victims:
                os.kill(pid, signal.SIGKILL)

        ends = ends_of(cluster, strike)
        assert ends["whole"] >= 40
        broken = {"RemoteProtocolError", "ReadError", "ConnectError"}
        assert ends.keys() - broken == {"whole"}, ends
        assert cluster.settled() == []
        after = {name: row["pid"] for name, row in cluster.workers().items()}
        assert {name for name in NAMES if after[name] != before[name]} == {*also}
    assert leftovers == []


@pytest.mark.parametrize("name", ["prefill-0", "decode-1"])
def test_a_worker_that_pauses_is_waited_for(tmp_path: Path, name: str) -> None:
    """0.7 s without a sign of life, of the five after which it would be dead: nobody new is sent
    there meanwhile, and whoever is there waits and is served."""
    profile = write_profile(tmp_path / "chaos.toml", PROFILE)
    leftovers: list[str] = []
    config = CONFIG.format(profile=profile).replace("dead_after_s = 1.0", "dead_after_s = 5.0")
    with serving(config, tmp_path, leftovers) as cluster:
        pid = cluster.workers()[name]["pid"]

        def strike() -> None:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.7)
            os.kill(pid, signal.SIGCONT)

        assert ends_of(cluster, strike) == {"whole": 80}
        assert cluster.settled() == []
        assert cluster.workers()[name]["starts"] == 1
    assert leftovers == []


# ---- links and disks -------------------------------------------------------------------------


def test_a_link_that_is_too_slow_is_an_error_in_time() -> None:
    """A prompt's 400 kB need 40 s at 10 kB/s: each attempt's hand-over gives up after 0.5 s."""
    network = {"transport": "shm", "cap_bytes_per_s": 1e4}
    failure = {"transfer_deadline_s": 0.5, "replacements_max": 1}
    with live(a_config(**BYTES, network=network, failure=failure)) as (client, front):
        answer = client.post("/v1/completions", json=completion(prompt=[*range(100)]))
        assert answer.status_code == 500
        assert "hand-over" in answer.text
        assert front.cluster.counts == {"failed": 1}


def with_ssd(tmp_path: Path) -> Any:
    """1P+1D; 10 blocks fit into DRAM, 100 on SSD; every block is verified."""
    fields: dict[str, Any] = {**BYTES, "prefill_instances": 1, "decode_instances": 1}
    fields["prefill"] = {"dram_tokens": 100, "ssd_tokens": 1000}
    fields["pool"] = {**BYTES["pool"], "ssd_directory": str(tmp_path)}
    return a_config(**fields, network={"transport": "shm", "verify": "always"})


def cached_tokens(client: httpx.Client, prompt: list[int]) -> int:
    answer = client.post("/v1/completions", json=completion(prompt=prompt))
    assert answer.status_code == 200, answer.text
    cached: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached


def families(count: int) -> list[list[int]]:
    """Prompts of 85 tokens that share nothing."""
    return [[*range(family * 1000, family * 1000 + 85)] for family in range(1, 1 + count)]


def test_a_full_disk_costs_reuse_and_nothing_else(tmp_path: Path) -> None:
    """Not a block can be written: what sinks is gone and is computed anew, and right."""
    (tmp_path / "prefill-0").mkdir()
    (tmp_path / "prefill-0" / "blocks").symlink_to("/dev/full")
    with live(with_ssd(tmp_path)) as (client, front):
        prompts = families(5)
        for prompt in prompts:
            assert cached_tokens(client, prompt) == 0
        assert cached_tokens(client, prompts[-1]) == 84  # The last token is always computed.
        assert cached_tokens(client, prompts[0]) == 0
        assert front.cluster.counts == {"finished": 7}
        assert total(client, "mismatched_blocks") == 0


def test_a_block_that_is_damaged_on_ssd_is_computed_anew(tmp_path: Path) -> None:
    """Every byte of the file changes: checksums tell, nobody decodes with any of it."""
    with live(with_ssd(tmp_path)) as (client, front):
        prompts = families(5)
        for prompt in prompts:
            assert cached_tokens(client, prompt) == 0
        file = tmp_path / "prefill-0" / "blocks"
        wait_until(lambda: file.stat().st_size >= 30 * 40960)
        assert cached_tokens(client, prompts[0]) == 84
        for prompt in prompts[1:]:
            cached_tokens(client, prompt)
        file.write_bytes(bytes(file.stat().st_size))
        for prompt in prompts[:2]:
            assert cached_tokens(client, prompt) == 0
        assert front.cluster.counts == {"finished": 12}
        assert total(client, "mismatched_blocks") == 0


def test_a_trace_of_real_bytes_arrives_whole(tmp_path: Path) -> None:
    """A few seconds of `tests/bench/cluster_bytes.py`, where all prompts begin alike: nothing is
    missing or wrong, and both prefill workers have the first block."""
    rows = trace_rows(5, 12.0, 5.0)
    for row in rows:
        row["hash_ids"][0] = 0
    trace = write_trace(tmp_path / "trace.jsonl", rows)
    config = a_config(
        **{**BYTES, "prefill": {"dram_tokens": 20_000}},
        block_tokens=512,
        network={"transport": "shm", "verify": "always"},
    )
    found = carried(config, trace, tmp_path / "run", PROFILE)
    assert wrong(found) == []
    assert found["offered"] == len(rows)
