"""What workers of vLLM are told by each of its own connectors; without vLLM."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import pytest

from reference_cluster.config import ClusterConfig
from reference_cluster.engines.vllm.connectors import Connector, make_connector
from reference_cluster.engines.vllm.server import Address, Server, ServerError

# As vLLM 0.32's NixlConnector answers for a prompt of 300 tokens.
NIXL_ANSWER = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[7, 8, 9]],
    "remote_engine_id": "0c6b1e52-2f4f-4c0c-9f43-5a4f7bb7a0f4",
    "remote_request_id": "request-3-b7c9a1f2",
    "remote_host": "127.0.0.1",
    "remote_port": 15600,
    "tp_size": 1,
    "dcp_size": 1,
    "pp_size": 1,
    "remote_num_tokens": 300,
    "remote_blocks_expiry_time": None,
    "transfer_mode": "pull",
}
# As Mooncake's bootstrap server answers GET /query: engines by data-parallel rank.
BOOTSTRAP_ANSWER = {"0": {"engine_id": "engine-a", "worker_addr": {"0": {"0": "tcp://h:1"}}}}


@dataclass
class Peer:
    name: str = "prefill-0"
    facts: dict[str, Any] = field(default_factory=dict)

    def offer(self, blocks):
        return None


def a_config(connector: str, **vllm: Any) -> ClusterConfig:
    given = {
        "prefill_instances": 1,
        "decode_instances": 1,
        "engine": {"kind": "vllm"},
        "vllm": {
            "connector": connector,
            "urls": ["http://a", "http://b"],
            "bootstraps": ["http://127.0.0.1:9"],
            **vllm,
        },
    }
    return msgspec.convert(given, ClusterConfig)


def a_connector(name: str) -> Connector:
    return make_connector(a_config(name))


def test_nixl_says_at_the_decode_worker_what_the_prefill_worker_said():
    """Blocks, engine and address of the side channel, unchanged."""
    nixl = a_connector("nixl")
    asked = nixl.to_prefill("t", None, [])
    assert asked == {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    assert nixl.to_decode("t", Peer(), NIXL_ANSWER) == NIXL_ANSWER


@pytest.mark.parametrize("answered", [None, {}, NIXL_ANSWER | {"remote_block_ids": []}])
def test_an_answer_without_blocks_is_no_nixl(answered):
    """The decode worker would compute the whole prompt, and nobody would know."""
    with pytest.raises(ServerError, match=r"prefill-0: .* start it with NixlConnector"):
        a_connector("nixl").to_decode("t", Peer(), answered)


def test_mooncake_workers_meet_by_the_transfer_id():
    """The decode worker is told whom to ask for it."""
    mooncake = a_connector("mooncake")
    peer = Peer(facts={"engine_id": "engine-a", "bootstrap": "http://127.0.0.1:9"})
    assert mooncake.to_prefill("t", None, []) == {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "transfer_id": "t",
    }
    assert mooncake.to_decode("t", peer, None) == {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "transfer_id": "t",
        "remote_engine_id": "engine-a",
        "remote_bootstrap_addr": "http://127.0.0.1:9",
    }


def test_a_store_needs_nothing_said():
    """What it has is found by its content."""
    store = a_connector("mooncake-store")
    assert store.to_prefill("t", None, []) is store.to_decode("t", Peer(), None) is None


@pytest.mark.parametrize("name", ["nixl", "mooncake", "mooncake-store"])
def test_a_prompt_that_nobody_goes_on_with_is_not_kept_for_anybody(name):
    """A worker would hold its blocks until they expire."""
    assert a_connector(name).to_prefill(None, None, []) is None


@pytest.mark.parametrize(
    ("name", "connector", "prefill_role", "variable"),
    [
        ("nixl", "NixlConnector", "kv_producer", "VLLM_NIXL_SIDE_CHANNEL_PORT"),
        ("mooncake", "MooncakeConnector", "kv_producer", "VLLM_MOONCAKE_BOOTSTRAP_PORT"),
        ("mooncake-store", "MooncakeStoreConnector", "kv_both", "VLLM_HOST_IP"),
    ],
)
def test_workers_start_with_the_connector_by_their_role(name, connector, prefill_role, variable):
    """What comes too late or never is computed, and options of the user's win."""
    config = a_config(name, connector_options={"num_workers": 2})
    for role, kv_role in (("prefill", prefill_role), ("decode", "kv_consumer")):
        setting = make_connector(config).setting(config, role, "mcb-x-")
        assert setting.transfer is not None
        assert setting.transfer["kv_connector"] == connector
        assert setting.transfer["kv_role"] == kv_role
        assert setting.transfer["kv_load_failure_policy"] == "recompute"
        assert setting.transfer["kv_connector_extra_config"]["num_workers"] == 2
        assert variable in setting.environment


def test_every_process_is_another_engine_to_mooncake():
    """A decode worker would write to where the one before listened."""
    config = a_config("mooncake")
    first, second = (make_connector(config).setting(config, "prefill", "mcb-x-") for _ in range(2))
    assert first.transfer is not None
    assert first.facts["engine_id"] == first.transfer["engine_id"] != second.facts["engine_id"]
    port = first.environment["VLLM_MOONCAKE_BOOTSTRAP_PORT"]
    assert first.facts["bootstrap"] == f"http://127.0.0.1:{port}"


def a_server(answer: Any) -> Server:
    """A stock one, whose bootstrap server answers so."""

    def bootstrap(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://127.0.0.1:9/query"
        return httpx.Response(200, json=answer)

    server = Server("prefill-0", httpx.AsyncClient(transport=httpx.MockTransport(bootstrap)))
    server.address = Address("http://a", facts={"bootstrap": "http://127.0.0.1:9"})
    return server


def test_a_stock_server_s_engine_is_asked_for_at_its_bootstrap_server():
    """That of data-parallel rank 0."""
    server = a_server(BOOTSTRAP_ANSWER)
    asyncio.run(server.learn_engine())
    params = a_connector("mooncake").to_decode("t", server, None)
    assert params is not None
    assert params["remote_engine_id"] == "engine-a"


def test_a_bootstrap_server_that_knows_nobody_yet_is_asked_again_later():
    """Until then the server is no member."""
    with pytest.raises(ServerError, match="knows no engine yet"):
        asyncio.run(a_server({}).learn_engine())
