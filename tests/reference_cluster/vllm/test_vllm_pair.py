"""A prefill and a decode worker of vLLM over our pool, against a single vLLM."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zlib import crc32

import httpx
import pytest

from reference_cluster.blocks import prefix_hashes
from reference_cluster.engines.vllm.store import HEADER, HEADER_BYTES, Offer, Slots
from reference_cluster.transports.bytes import Segment, sweep
from tests.reference_cluster.vllm.workers import (
    BLOCK,
    CONTROL,
    CROWD,
    LENGTHS,
    PAYLOAD_BYTES,
    PROMPTS,
    Worker,
    a_prompt,
    running,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]

SMALL_KV_BLOCKS = 72  # One is vLLM's null block.


@dataclass
class Pair:
    """One prefill and one decode worker; `prefix` is that of their segments."""

    transport: str
    prefix: str
    prefill: Worker
    decode: Worker

    def tokens(self, prompt: list[int]) -> list[int]:
        return self.decode.tokens(prompt, self.prefill.prefill(prompt))


@pytest.fixture(scope="module", params=["shm", "tcp"])
def pair(request: pytest.FixtureRequest, model: Path, single: Any) -> Iterator[Pair]:
    """Prefill in chunks of 512, decode with prefix caching and little memory of its own."""
    prefix = f"mcb-test{os.getpid()}-{request.param}-"
    extra = {
        "transport": request.param,
        "segment_prefix": prefix,
        "pool_bytes": 480 * (HEADER_BYTES + PAYLOAD_BYTES),
    }
    config = {
        "kv_connector": "PoolConnector",
        "kv_connector_module_path": "reference_cluster.engines.vllm.connector",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }
    prefill = Worker(
        model,
        max_num_batched_tokens=512,
        kv_bytes=128 * PAYLOAD_BYTES,
        kv_transfer_config=config | {"kv_role": "kv_producer"},
    )
    decode = Worker(
        model,
        kv_bytes=SMALL_KV_BLOCKS * PAYLOAD_BYTES,
        kv_transfer_config=config | {"kv_role": "kv_consumer"},
    )
    try:
        with running(prefill, decode):
            yield Pair(request.param, prefix, prefill, decode)
    finally:
        sweep(prefix)


def whole_blocks(prompt: list[int]) -> tuple[int, ...]:
    """Keys of the blocks that a decode worker can be spared: all but the last token's."""
    return prefix_hashes(prompt[: (len(prompt) - 1) // BLOCK * BLOCK], BLOCK)


def is_at_rest(worker: Worker) -> bool:
    told = worker.pool()
    return (told["engine_blocks"], told["pinned_blocks"], told["requests"]) == (0, 0, 0)


def comes_to_rest(worker: Worker) -> bool:
    """Within a few seconds: what was aborted ends with the step under way."""
    return any(is_at_rest(worker) or time.sleep(0.1) for _ in range(100))


def test_thirty_prompts_come_out_as_from_a_single_vllm(pair, single):
    """Up to 8,192 tokens; every whole block came from the pool, by all three accounts."""
    sources = "vllm:prompt_tokens_by_source_total"
    for prompt in PROMPTS:
        assert pair.tokens(prompt) == single[id(prompt)], f"{len(prompt)} tokens"
    spared = sum(BLOCK * len(whole_blocks(prompt)) for prompt in PROMPTS)
    computed = pair.decode.count(sources, 'source="local_compute"')
    external = pair.decode.count(sources, 'source="external_kv_transfer"')
    local = pair.decode.count(sources, 'source="local_cache_hit"')
    assert (computed, external + local) == (sum(LENGTHS) - spared, spared)
    told = pair.decode.pool()
    assert told["loaded_blocks"] * BLOCK == external
    # The last block of a prompt of whole blocks it computes itself, and then has it for others.
    spare = {key for prompt in PROMPTS for key in whole_blocks(prompt)}
    own = {prefix_hashes(one, BLOCK)[-1] for one in PROMPTS if len(one) % BLOCK == 0}
    assert told["held_blocks"] == len(spare - own)
    assert told["fetched_bytes"] == len(spare - own) * (HEADER_BYTES + PAYLOAD_BYTES)
    assert told["lost_blocks"] == 0
    assert is_at_rest(pair.prefill)
    assert is_at_rest(pair.decode)


def overwrite(transfer: dict[str, Any], keys: tuple[int, ...], *, is_hidden: bool) -> None:
    """Zero the blocks at the prefill worker; `is_hidden`: under a header that says all is well."""
    import msgspec

    offer = msgspec.convert(transfer["pool"], Offer)
    segment = Segment.attach(offer.endpoint.segment)
    try:
        slots = Slots(segment.buffer, bytes(8), PAYLOAD_BYTES)
        for slot, key in zip(offer.slots, keys, strict=False):
            payload = slots.payload(slot)
            payload[:] = bytes(PAYLOAD_BYTES)
            if is_hidden:
                start = slot * slots.slot_bytes
                namespace = bytes(segment.buffer[start : start + 8])
                HEADER.pack_into(segment.buffer, start, namespace, key, crc32(payload))
            payload.release()
    finally:
        segment.close()


def test_zeroed_bytes_change_the_tokens(pair, single):
    """The negative control: the decode worker really computes with what it fetched."""
    prompt = CONTROL[0]
    transfer = pair.prefill.prefill(prompt)
    overwrite(transfer, whole_blocks(prompt), is_hidden=True)
    assert pair.decode.tokens(prompt, transfer) != single[id(prompt)]


def test_damaged_blocks_are_noticed_and_computed_anew(pair, single):
    """The same without a forged header: 5 blocks are lost, the tokens are right."""
    prompt, before = CONTROL[1], pair.decode.pool()["lost_blocks"]
    transfer = pair.prefill.prefill(prompt)
    overwrite(transfer, whole_blocks(prompt), is_hidden=False)
    assert pair.decode.tokens(prompt, transfer) == single[id(prompt)]
    assert pair.decode.pool()["lost_blocks"] - before == 5


def test_tokens_are_the_same_under_preemption(pair, single):
    """Six at once where five have room: some give way, and come back by the pool."""
    before = pair.decode.count("vllm:num_preemptions_total")
    transfers = [pair.prefill.prefill(prompt) for prompt in CROWD]
    with ThreadPoolExecutor(len(CROWD)) as threads:
        answers = list(threads.map(pair.decode.tokens, CROWD, transfers))
    assert answers == [single[id(prompt)] for prompt in CROWD]
    assert pair.decode.count("vllm:num_preemptions_total") > before
    assert is_at_rest(pair.decode)


def test_a_client_that_hangs_up_leaves_nothing_behind(pair):
    """In the middle of a prompt at the prefill worker, of an answer at the decode worker."""
    prompt, produced = a_prompt(300, 8000), "vllm:generation_tokens_total"
    before = pair.prefill.count(produced)
    body = {"prompt": prompt, "max_tokens": 1}
    with pytest.raises(httpx.ReadTimeout):
        pair.prefill.http.post("/v1/completions", json=body, timeout=0.2)
    assert comes_to_rest(pair.prefill)
    assert pair.prefill.count(produced) == before

    transfer = pair.prefill.prefill(prompt)
    before = pair.decode.count(produced)
    body = {"prompt": prompt, "max_tokens": 400, "ignore_eos": True, "stream": True}
    body["kv_transfer_params"] = transfer
    with pair.decode.http.stream("POST", "/v1/completions", json=body) as answer:
        assert "token_ids" in next(answer.iter_lines())
    assert comes_to_rest(pair.decode)
    assert 0 < pair.decode.count(produced) - before < 400


def test_a_killed_prefill_worker_costs_a_prefill(pair, single):
    """Its offer is worth nothing by TCP any more; the decode worker computes the prompt itself."""
    prompt = CONTROL[2]
    transfer = pair.prefill.prefill(prompt)
    pair.prefill.kill()
    assert pair.decode.tokens(prompt, transfer) == single[id(prompt)]
    assert is_at_rest(pair.decode)
