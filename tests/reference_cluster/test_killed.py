"""What does a client notice of a process that is killed or hangs? As little as can be."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.reference_cluster.live import live, problems, wait_until
from tests.reference_cluster.small import a_config, a_profile
from tests.reference_cluster.test_processes import BYTES, completion, served, workers

pytestmark = [pytest.mark.live, pytest.mark.timeout(60)]
# A prefill takes 0.3 s, a step 10 ms.
SLOW = a_profile(prefill={"base_s": 0.3}, decode={"base_s": 0.01}, link_bytes_per_s=1e9)
QUICK = {"placement": "processes", "heartbeat_s": 0.1, "dead_after_s": 0.8}


def a_cluster(**fields: Any) -> Any:
    network = {"transport": "shm", "verify": "always"}
    return a_config(**{**BYTES, "workers": QUICK, "network": network, **fields})


def stream(client: httpx.Client, max_tokens: int, started: threading.Event) -> str:
    """All that a streaming client reads; `started` tells of the first token."""
    body = completion(stream=True, max_tokens=max_tokens, prompt=[*range(95)])
    text = ""
    with client.stream("POST", "/v1/completions", json=body) as answer:
        for part in answer.iter_text():
            text += part
            started.set()
    return text


def kill(client: httpx.Client, name: str, number: int) -> int:
    pid: int = workers(client)[name]["pid"]
    os.kill(pid, number)
    return pid


def is_a_member_again(client: httpx.Client, name: str, before: int) -> bool:
    row = workers(client)[name]
    return row["state"] == "member" and row["pid"] != before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stream_goes_on_when_its_decode_worker_is_lost(number: int) -> None:
    """Killed, or stopped for good: 100 tokens in all, from two workers. No process lives on."""
    with live(a_cluster(), SLOW) as (client, front), ThreadPoolExecutor(1) as pool:
        started = threading.Event()
        text = pool.submit(stream, client, 100, started)
        assert started.wait(10.0)
        name = next(one.name for one in front.cluster.decode if one.expected or one.batch.size)
        kill(client, name, number)
        found = text.result(20.0)
        assert found.endswith("data: [DONE]\n\n")
        assert found.count('"text":" the"') == 100
        assert front.cluster.recovery.counts == {"lost_instances": 1, "resumed": 1}
        assert workers(client)[name]["state"] == "lost"


def test_a_prompt_is_computed_elsewhere_when_its_prefill_worker_is_lost() -> None:
    """Killed in the middle of it: answered all the same, half a second later."""
    with live(a_cluster(), SLOW) as (client, front), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/v1/completions", json=completion())
        wait_until(lambda: any(one.running is not None for one in front.cluster.prefill))
        name = next(one.name for one in front.cluster.prefill if one.running is not None)
        kill(client, name, signal.SIGKILL)
        assert answer.result(20.0).status_code == 200
        assert front.cluster.recovery.counts == {"lost_instances": 1, "replaced": 1}
        assert front.cluster.index.match(tuple(front.cluster.index.holders))[int(name[-1])] == 0


def test_a_colocated_worker_is_lost_with_a_stream() -> None:
    """The other one goes on."""
    config = a_config(system="colocated", colocated_instances=2, workers=QUICK)
    with live(config, SLOW) as (client, front), ThreadPoolExecutor(1) as pool:
        started = threading.Event()
        text = pool.submit(stream, client, 60, started)
        assert started.wait(10.0)
        name = next(one.name for one in front.cluster.colocated if one.batch.size or one.started)
        kill(client, name, signal.SIGKILL)
        assert text.result(20.0).count('"text":" the"') == 60


def test_without_resuming_the_stream_ends_with_an_error() -> None:
    """An event that names the reason, and no [DONE]."""
    config = a_cluster(failure={"resume": False})
    with live(config, SLOW) as (client, front), ThreadPoolExecutor(1) as pool:
        started = threading.Event()
        text = pool.submit(stream, client, 100, started)
        assert started.wait(10.0)
        name = next(one.name for one in front.cluster.decode if one.expected or one.batch.size)
        kill(client, name, signal.SIGKILL)
        found = text.result(20.0)
        assert "lost-decode" in found
        assert "[DONE]" not in found
        assert front.cluster.counts == {"failed": 1}


CONFIG = """
block_tokens = 10
[prefill]
dram_tokens = 1000
[pool]
kv_bytes_per_token = 4096
[network]
transport = "shm"
[workers]
heartbeat_s = 0.1
dead_after_s = 0.8
"""


def test_whoever_is_killed_comes_back(tmp_path: Path) -> None:
    """1P+1D: each worker in turn; requests wait for it. Its memory is swept, its place taken."""
    with (
        served(tmp_path, CONFIG) as (place, _),
        httpx.Client(base_url=f"http://{place}", timeout=20.0) as client,
    ):
        for name in ("prefill-0", "decode-0"):
            segment = workers(client)[name]["segment"]
            before = kill(client, name, signal.SIGKILL)
            wait_until(lambda name=name, before=before: is_a_member_again(client, name, before))
            assert not Path("/dev/shm", segment).exists()
            assert client.post("/v1/completions", json=completion()).status_code == 200
        wait_until(lambda: not problems(client, {}))


def test_blocks_on_ssd_survive_their_worker(tmp_path: Path) -> None:
    """10 blocks fit into DRAM, 100 on SSD: what has sunk is there after a kill, and right."""
    config = CONFIG.replace("dram_tokens = 1000", "dram_tokens = 100\nssd_tokens = 1000")
    config = config.replace("[pool]", f'[pool]\nssd_directory = "{tmp_path}"')
    config = config.replace('"shm"', '"shm"\nverify = "always"')
    with (
        served(tmp_path, config) as (place, _),
        httpx.Client(base_url=f"http://{place}", timeout=20.0) as client,
    ):
        for family in range(5):
            prompt = [*range(family * 1000, family * 1000 + 85)]
            client.post("/v1/completions", json=completion(prompt=prompt))
        before = kill(client, "prefill-0", signal.SIGKILL)
        wait_until(lambda: is_a_member_again(client, "prefill-0", before))
        answer = client.post("/v1/completions", json=completion(prompt=[*range(85), 1]))
        assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 80
        wait_until(lambda: not problems(client, {}))
        rows = workers(client).values()
        assert sum(row.get("mismatched_blocks", 0) for row in rows) == 0


def test_workers_survive_a_new_conductor(tmp_path: Path) -> None:
    """The same processes say hello again and tell what they hold: a prefix is still there."""
    with (
        served(tmp_path, CONFIG) as (place, _),
        httpx.Client(base_url=f"http://{place}", timeout=20.0) as client,
    ):
        assert client.post("/v1/completions", json=completion()).status_code == 200
        before = {name: row["pid"] for name, row in workers(client).items()}
        os.kill(the_conductor(before), signal.SIGKILL)
        answer = httpx.post(f"http://{place}/v1/completions", json=completion(), timeout=20.0)
        assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 39
        assert {name: row["pid"] for name, row in workers(client).items()} == before


def test_a_new_conductor_ends_a_worker_that_hangs(tmp_path: Path) -> None:
    """It never says hello to anybody: found by its socket, killed, started again."""
    with (
        served(tmp_path, CONFIG) as (place, _),
        httpx.Client(base_url=f"http://{place}", timeout=20.0) as client,
    ):
        before = {name: row["pid"] for name, row in workers(client).items()}
        os.kill(before["decode-0"], signal.SIGSTOP)
        os.kill(the_conductor(before), signal.SIGKILL)
        answer = httpx.post(f"http://{place}/v1/completions", json=completion(), timeout=30.0)
        assert answer.status_code == 200
        with httpx.Client(base_url=f"http://{place}", timeout=20.0) as again:
            after = {name: row["pid"] for name, row in workers(again).items()}
        assert after["prefill-0"] == before["prefill-0"]
        assert after["decode-0"] != before["decode-0"]


def the_conductor(pids: dict[str, int]) -> int:
    """The supervisor's one child that is no worker."""
    parent = Path(f"/proc/{pids['prefill-0']}/stat").read_text().rsplit(")", 1)[1].split()[1]
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    (conductor,) = {int(pid) for pid in children} - {*pids.values()}
    return conductor
