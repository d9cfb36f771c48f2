"""vLLM's own connectors behind the Conductor, against a single vLLM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from reference_cluster.config import load_config
from reference_cluster.engines.vllm.connectors import free_port, make_connector
from reference_cluster.engines.vllm.server import Address, Server
from tests.reference_cluster.vllm.served import PROFILE, Served, config_of, wait_until_at_rest
from tests.reference_cluster.vllm.workers import (
    BLOCK,
    CONTROL,
    LENGTHS,
    PAYLOAD_BYTES,
    PROMPTS,
    a_prompt,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]
needs_mooncake = pytest.mark.skipif(
    find_spec("mooncake") is None, reason="Mooncake's engine is not installed: make test-vllm"
)
SOURCES = "vllm:prompt_tokens_by_source_total"
Start = Callable[..., Served]


@pytest.fixture(scope="class")
def start(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """1P+1D of a connector; prefill in chunks of 512."""
    started: list[Served] = []

    def begin(connector: str, **sections: dict[str, Any]) -> Served:
        directory = tmp_path_factory.mktemp("cluster")
        (directory / "profile.toml").write_text(PROFILE)
        sections["vllm"] = {"connector": connector, **sections.get("vllm", {})}
        served = Served(config_of(model, directory / "profile.toml", **sections), directory)
        started.append(served)
        return served.wait()

    try:
        yield begin
    finally:
        for served in started:
            served.close()


@pytest.fixture(scope="class")
def nixl(start: Start) -> Served:
    """Its leases are short, so that what nobody fetches is free again soon."""
    return start("nixl", **{"vllm.connector_options": {"kv_lease_duration": 6}})


@pytest.fixture(scope="class")
def mooncake(start: Start) -> Served:
    return start("mooncake", **{"vllm.connector_options": {"num_workers": 2}})


@pytest.fixture(scope="class")
def store(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings = {
        "metadata_server": "P2PHANDSHAKE",
        "protocol": "tcp",
        "device_name": "",
        "global_segment_size": "256mb",
        "local_buffer_size": "64mb",
    }
    with a_master() as address:
        config = tmp_path_factory.mktemp("store") / "mooncake.json"
        config.write_text(json.dumps(settings | {"master_server_address": address}))
        environment = {"MOONCAKE_CONFIG_PATH": str(config)}
        yield start("mooncake-store", **{"vllm.environment": environment})


@contextmanager
def a_master() -> Iterator[str]:
    """The master of a Mooncake store; its address."""
    rpc, metrics = free_port("127.0.0.1"), free_port("127.0.0.1")
    program = Path(sys.executable).parent / "mooncake_master"
    flags = ("-rpc_address", "127.0.0.1", "-rpc_port", str(rpc), "-metrics_port", str(metrics))
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen([program, *flags], stdout=nowhere, stderr=nowhere)
    try:
        end_s = time.monotonic() + 20
        while not is_listening(rpc):
            assert time.monotonic() < end_s, "mooncake_master does not listen"
            time.sleep(0.05)
        yield f"127.0.0.1:{rpc}"
    finally:
        process.terminate()
        process.wait(10)


def is_listening(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def tokens_by_source(cluster: Served) -> tuple[float, float]:
    """The decode worker's: computed by itself, and what it got or had."""
    sources = ("local_compute", "external_kv_transfer", "local_cache_hit")
    counts = [cluster.count("decode-0", SOURCES, f'source="{one}"') for one in sources]
    return counts[0], counts[1] + counts[2]


class Direct:
    """The workers themselves, past the Conductor, asked as it asks them."""

    def __init__(self, cluster: Served, connector: str) -> None:
        self.cluster = cluster
        given = {"vllm.connector": connector, "engine.kind": "vllm", "vllm.urls": ["http://a"] * 2}
        given |= {"vllm.bootstraps": ["http://b"], "prefill_instances": 1, "decode_instances": 1}
        self.connector = make_connector(load_config(None, given))

    def ask(self, name: str, prompt: list[int], tokens: int, params: Any) -> dict[str, Any]:
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        url = f"{self.cluster.row(name)['url']}/v1/completions"
        answer = httpx.post(url, json=body | {"kv_transfer_params": params}, timeout=60)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """What the decode worker must be told."""
        transfer_id = os.urandom(4).hex()
        asked = self.connector.to_prefill(transfer_id, None, ())
        answer = self.ask("prefill-0", prompt, 1, asked)
        params = answer["kv_transfer_params"]
        told = self.connector.to_decode(transfer_id, asyncio.run(self.prefill_server()), params)
        assert told is not None
        return told

    async def prefill_server(self) -> Server:
        """As one that others have started, of which the Conductor was told where it is."""
        server = Server("prefill-0", httpx.AsyncClient())
        bootstrap = self.cluster.row("prefill-0")["bootstrap"]
        server.address = Address("", facts={"bootstrap": bootstrap} if bootstrap else {})
        await server.learn_engine()
        return server

    def decode(self, prompt: list[int], params: dict[str, Any]) -> list[int]:
        tokens: list[int] = self.ask("decode-0", prompt, 24, params)["choices"][0]["token_ids"]
        return tokens


def check_thirty_prompts(cluster: Served, single: dict[int, list[int]]) -> None:
    """All come out as from a single vLLM, and the decode worker has computed none of them."""
    for prompt in PROMPTS:
        assert cluster.tokens(prompt) == single[id(prompt)], f"{len(prompt)} tokens"
    # The last token of a prompt that came whole is computed anew, and not counted.
    assert tokens_by_source(cluster) == (0, sum(LENGTHS))
    wait_until_at_rest(cluster)


def check_crossed_wires(cluster: Served, connector: str, single: dict[int, list[int]]) -> None:
    """The negative control: with another prompt's KV the tokens are others."""
    direct = Direct(cluster, connector)
    first, second, third = (direct.prefill(prompt) for prompt in CONTROL[:3])
    assert direct.decode(CONTROL[0], second) != single[id(CONTROL[0])]
    assert direct.decode(CONTROL[1], first) != single[id(CONTROL[1])]
    assert direct.decode(CONTROL[2], third) == single[id(CONTROL[2])]
    wait_until_at_rest(cluster)


class TestNixl:
    """The decode worker reads out of the prefill worker's memory."""

    def test_thirty_prompts_come_out_as_from_a_single_vllm(self, nixl, single):
        """NIXL has moved as many bytes as the blocks have."""
        check_thirty_prompts(nixl, single)
        external = nixl.count("decode-0", SOURCES, 'source="external_kv_transfer"')
        moved = nixl.count("decode-0", "vllm:nixl_bytes_transferred_sum")
        blocks = moved / PAYLOAD_BYTES
        assert external / BLOCK <= blocks <= external / BLOCK + len(PROMPTS)

    def test_another_prompts_kv_changes_the_tokens(self, nixl, single):
        """Both ways; straight they are right."""
        check_crossed_wires(nixl, "nixl", single)

    def test_what_would_miss_its_slo_is_refused_at_once(self, nixl):
        """The profile says 66 s for 8,192 tokens, the SLO 100; the worker computes one of two."""
        before = nixl.count("prefill-0", "vllm:prompt_tokens_total")
        prompts = [a_prompt(300 + i, 8192) for i in range(2)]
        with ThreadPoolExecutor(2) as threads:
            answers = list(threads.map(lambda prompt: nixl.ask(prompt, 2), prompts))
        assert sorted(one.status_code for one in answers) == [200, 429]
        assert nixl.count("prefill-0", "vllm:prompt_tokens_total") - before == 8192
        wait_until_at_rest(nixl)

    def test_a_client_that_hangs_up_leaves_nothing_behind(self, nixl):
        """In the middle of its prompt, and of its answer."""
        body = {"prompt": a_prompt(310, 8192), "max_tokens": 100, "ignore_eos": True}
        with pytest.raises(httpx.ReadTimeout):
            nixl.http.post("/v1/completions", json=body, timeout=0.3)
        wait_until_at_rest(nixl)

        before = nixl.count("decode-0", "vllm:generation_tokens_total")
        events = nixl.stream(a_prompt(311, 700), 4000)
        assert [len(next(events)) for _ in range(3)] == [1, 1, 1]
        events.close()
        wait_until_at_rest(nixl)
        assert nixl.count("decode-0", "vllm:generation_tokens_total") - before < 2000

    def test_blocks_that_nobody_fetches_are_free_when_their_lease_ends(self, nixl):
        """As when a client hangs up between the two workers."""
        Direct(nixl, "nixl").prefill(a_prompt(312, 700))
        end_s = time.monotonic() + 10
        while nixl.row("prefill-0")["engine_blocks"] != 6:
            assert time.monotonic() < end_s, nixl.row("prefill-0")
        wait_until_at_rest(nixl)

    def test_a_killed_prefill_worker_costs_the_decode_worker_a_prefill(self, nixl, single):
        """It has answered, and is gone before its blocks are read: the tokens are right."""
        direct, before = Direct(nixl, "nixl"), nixl.row("prefill-0")
        params = direct.prefill(CONTROL[3])
        computed, _ = tokens_by_source(nixl)
        os.kill(before["pid"], signal.SIGKILL)
        assert direct.decode(CONTROL[3], params) == single[id(CONTROL[3])]
        assert tokens_by_source(nixl)[0] > computed
        # There is no other one: until it is back all is refused.
        assert nixl.ask(CONTROL[4]).headers["x-rejection-reason"] == "no-instance"
        wait_until_at_rest(nixl)
        assert nixl.tokens(CONTROL[4]) == single[id(CONTROL[4])]
        assert nixl.row("prefill-0")["starts"] == before["starts"] + 1
        wait_until_at_rest(nixl)

    def test_a_stream_goes_on_after_its_decode_worker_was_killed(self, nixl):
        """Its next tokens come from the worker that was started instead."""
        prompt, before = CONTROL[5], nixl.row("decode-0")
        events = nixl.stream(prompt, 120)
        tokens = [token for _ in range(20) for token in next(events)]
        os.kill(before["pid"], signal.SIGKILL)
        tokens += [token for event in events for token in event]
        assert tokens == nixl.tokens(prompt, 120)
        assert nixl.row("decode-0")["starts"] == before["starts"] + 1
        wait_until_at_rest(nixl)


@needs_mooncake
class TestMooncake:
    """The prefill worker writes to the decode worker's memory, by Mooncake's engine over TCP."""

    def test_thirty_prompts_come_out_as_from_a_single_vllm(self, mooncake, single):
        """All of their KV has come from the prefill worker."""
        check_thirty_prompts(mooncake, single)

    def test_another_prompts_kv_changes_the_tokens(self, mooncake, single):
        """Both ways; straight they are right."""
        check_crossed_wires(mooncake, "mooncake", single)


@needs_mooncake
class TestMooncakeStore:
    """Both workers keep KV in a Mooncake store, whose master is a process of its own."""

    def test_thirty_prompts_come_out_as_from_a_single_vllm(self, store, single):
        """Most whole blocks came from the store: what is not saved yet is computed."""
        for prompt in PROMPTS:
            assert store.tokens(prompt) == single[id(prompt)], f"{len(prompt)} tokens"
        whole = sum((length - 1) // BLOCK * BLOCK for length in LENGTHS)
        _, spared = tokens_by_source(store)
        assert whole / 2 < spared <= whole
        wait_until_at_rest(store)
