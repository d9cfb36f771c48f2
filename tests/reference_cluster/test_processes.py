"""Do instances in processes of their own serve as those in one do, with real bytes between them?"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from reference_cluster.transports.bytes import SHARED_MEMORY
from tests.reference_cluster.live import FAST, live, wait_until
from tests.reference_cluster.small import a_config, a_profile, write_profile

REPO = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.live, pytest.mark.timeout(60)]
# A block of 10 tokens has 40 kB in 4 layers.
BYTES: dict[str, Any] = {
    "prefill_instances": 2,
    "decode_instances": 2,
    "workers": {"placement": "processes"},
    "prefill": {"dram_tokens": 1000},
    "pool": {"kv_bytes_per_token": 4096, "working_tokens": 4000},
}


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": [*range(1000, 1040)], "max_tokens": 5, **fields}


def workers(client: httpx.Client) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in client.get("/cluster/info").json()["workers"]}


def total(client: httpx.Client, count: str) -> float:
    return sum(row.get(count, 0.0) for row in workers(client).values())


def ask_many(url: str, prompts: list[list[int]], max_tokens: int = 5) -> list[int]:
    """Status codes of prompts sent all at once."""

    async def main() -> list[int]:
        async with httpx.AsyncClient(base_url=url, timeout=30.0) as client:
            bodies = [completion(prompt=prompt, max_tokens=max_tokens) for prompt in prompts]
            answers = [client.post("/v1/completions", json=body) for body in bodies]
            return [one.status_code for one in await asyncio.gather(*answers)]

    return asyncio.run(main())


@pytest.mark.parametrize("transport", ["shm", "tcp", "mooncake"])
def test_every_block_arrives_as_it_was_computed(transport: str) -> None:
    """30 prompts of 100 to 390 tokens that share a prefix: all bytes verified where they decode."""
    if transport == "mooncake":
        pytest.importorskip("mooncake.engine", reason="the extra [mooncake] is not installed")
    prompts = [[*range(100), *range(n * 1000, n * 1000 + 10 * n)] for n in range(30)]
    network = {"transport": transport, "verify": "always"}
    with live(a_config(**BYTES, network=network)) as (client, front):
        assert ask_many(str(client.base_url), prompts) == [200] * 30
        assert front.cluster.counts == {"finished": 30}
        blocks = sum(-(-len(prompt) // 10) for prompt in prompts)
        wait_until(lambda: total(client, "verified_blocks") >= blocks)
        wait_until(lambda: total(client, "sent_bytes") == blocks * 40960)
        assert total(client, "mismatched_blocks") == 0
        text = client.get("/metrics").text
        assert 'mooncake_bench_kv_sent_bytes_total{instance="prefill-0"}' in text
        assert 'mooncake_bench_worker_up{instance="decode-1"} 1.0' in text


def test_a_prefix_is_fetched_from_the_peer_that_holds_it() -> None:
    """The holder is busy for 2 s with something else: the other copies its 20 blocks and serves."""
    config = a_config(**BYTES, network={"transport": "shm", "verify": "always"})
    profile = a_profile(prefill={"base_s": 0.01, "token_s": 2e-3}, link_bytes_per_s=1e9)
    shared = [*range(200)]
    with live(config, profile) as (client, front), ThreadPoolExecutor(1) as pool:
        client.post("/v1/completions", json=completion(prompt=[*shared, 1]))
        busy = pool.submit(client.post, "/v1/completions", json=completion(prompt=[7] * 900))
        wait_until(lambda: front.cluster.prefill[0].running is not None)
        body = completion(prompt=[*shared, 2, 2])
        assert client.post("/v1/completions", json=body).status_code == 200
        assert busy.result(20.0).status_code == 200
        wait_until(lambda: total(client, "fetched_bytes") == 20 * 40960)
        assert total(client, "mismatched_blocks") == 0


def test_hot_blocks_are_copied_ahead_of_demand() -> None:
    """Two requests for the same 5 blocks on one instance: the other has them within a second."""
    prefill = {"dram_tokens": 1000, "replicate_keys": 5, "replicate_every_s": 0.2}
    conductor = {"scheduling": "local-cache-aware"}
    config = a_config(
        **{**BYTES, "prefill": prefill}, conductor=conductor, network={"transport": "shm"}
    )
    with live(config) as (client, front):
        for _ in range(2):
            client.post("/v1/completions", json=completion(prompt=[*range(50)]))
        wait_until(lambda: front.cluster.index.match(tuple(front.cluster.index.holders)) == [5, 5])
        assert front.cluster.replicator is not None
        assert front.cluster.replicator.copied_blocks == 5


# ---- the whole of serve ----------------------------------------------------------------------


@contextmanager
def served(tmp_path: Path, config: str = "") -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`serve` in a process of its own; its URL and its supervisor."""
    profile = write_profile(tmp_path / "fast.toml", FAST)
    (tmp_path / "config.toml").write_text(f'profile = "{profile}"\n{config}')
    command = [sys.executable, "-m", "mooncake_bench.cli", "serve", "--port", "0"]
    command += ["--config", str(tmp_path / "config.toml"), "--prefill", "1", "--decode", "1"]
    with subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert "http://" in line, line + process.stderr.read()
            yield line.split("http://")[1].split(" ")[0], process
        finally:
            process.terminate()
            process.wait(15.0)


SHM = """
block_tokens = 10
[prefill]
dram_tokens = 1000
[pool]
kv_bytes_per_token = 4096
[network]
transport = "shm"
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie is dead, but for its parent.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_however_the_server_ends(tmp_path: Path, number: int) -> None:
    """No worker, no Conductor; no shared memory, but after SIGKILL that of the next sweep."""
    with served(tmp_path, SHM) as (place, process):
        with httpx.Client(base_url=f"http://{place}") as client:
            assert client.post("/v1/completions", json=completion()).status_code == 200
            rows = workers(client).values()
        pids, segments = [row["pid"] for row in rows], [row["segment"] for row in rows]
        assert all((SHARED_MEMORY / name).exists() for name in segments)
        process.send_signal(number)
        process.wait(15.0)
    wait_until(lambda: not any(map(is_alive, pids)))
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{place}/health")
    if number == signal.SIGKILL:
        with served(tmp_path, SHM):
            assert not any((SHARED_MEMORY / name).exists() for name in segments)
    assert not any((SHARED_MEMORY / name).exists() for name in segments)


def test_what_is_served_may_end_when_the_server_is_asked_to(tmp_path: Path) -> None:
    """A stream of 500 steps, 1 ms each, is half done at SIGTERM and comes to its end."""
    body = completion(stream=True, max_tokens=500)
    with (
        served(tmp_path) as (place, process),
        httpx.stream("POST", f"http://{place}/v1/completions", json=body, timeout=20) as answer,
    ):
        chunks = answer.iter_text()
        text = next(chunks)
        process.terminate()
        text += "".join(chunks)
    assert text.endswith("data: [DONE]\n\n")


def test_memory_that_is_not_there_is_told_in_a_line(tmp_path: Path) -> None:
    """A pool of 400 TB: the worker says so, and the server ends after a few tries."""
    profile = write_profile(tmp_path / "fast.toml", FAST)
    config = SHM.replace("dram_tokens = 1000", "dram_tokens = 100_000_000_000")
    (tmp_path / "config.toml").write_text(f'profile = "{profile}"\n{config}')
    command = [sys.executable, "-m", "mooncake_bench.cli", "serve", "--port", "0"]
    command += ["--config", str(tmp_path / "config.toml"), "--prefill", "1", "--decode", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=40)
    assert done.returncode == 2
    assert "free space there or make the pool smaller" in done.stderr
    assert "Traceback" not in done.stderr
    assert "prefill-0 does not start" in done.stderr


def test_a_worker_that_never_says_hello_is_named(tmp_path: Path) -> None:
    """One line, exit code 2, within the time given."""
    profile = write_profile(tmp_path / "fast.toml", FAST)
    config = tmp_path / "config.toml"
    config.write_text(
        f'profile = "{profile}"\nprefill_instances = 1\ndecode_instances = 1\n'
        "[workers]\nstart_s_max = 0.01\n"
    )
    command = [sys.executable, "-m", "mooncake_bench.cli", "serve", "--port", "0"]
    begun_s = time.monotonic()
    done = subprocess.run(
        [*command, "--config", str(config)], capture_output=True, text=True, cwd=REPO, timeout=30
    )
    assert time.monotonic() - begun_s < 25
    assert done.returncode == 2
    assert "no hello in 0.01 s" in done.stderr, done.stderr
    assert "prefill-0" in done.stderr or "decode-0" in done.stderr
