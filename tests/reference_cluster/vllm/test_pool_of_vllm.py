"""What vLLM's scheduler is told of the pool, and what a slot holds; without vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from reference_cluster.blocks import prefix_hashes
from reference_cluster.engines.vllm.planner import Planner
from reference_cluster.engines.vllm.store import HEADER_BYTES, Index, Offer, Slots
from reference_cluster.transports.bytes import Endpoint

BLOCK = 4
HERE = Endpoint("shm", "here", "mcb-here", 1000)
THERE = Endpoint("shm", "there", "mcb-there", 1000, b"key")


@dataclass
class Request:
    """As vLLM's, as far as the planner looks."""

    request_id: str
    prompt_token_ids: list[int]
    num_computed_tokens: int = 0
    kv_transfer_params: dict[str, Any] | None = None
    cache_salt: str | None = None


def a_planner(slots: int = 8, **role: bool) -> Planner:
    planner = Planner(BLOCK, **role)
    planner.open(HERE, slots)
    return planner


def an_offer(*slots: int) -> dict[str, Any]:
    return {"pool": msgspec.to_builtins(Offer(THERE, list(slots)))}


def computed(planner: Planner, request: Request, table: list[int]) -> dict[str, Any] | None:
    """The request's whole prompt in one step, to its end."""
    assert planner.external_tokens(request, 0) == 0
    planner.step({request.request_id: len(request.prompt_token_ids)}, lambda _: table)
    return planner.finished(request)


def test_a_prompt_computed_in_chunks_is_saved_block_by_block():
    """9 tokens are two whole blocks; each is saved in the step that completes it."""
    planner, request = a_planner(), Request("a", list(range(9)))
    keys = prefix_hashes(range(8), BLOCK)
    assert planner.external_tokens(request, 0) == 0
    assert planner.step({"a": 5}, lambda _: [30, 31, 32]) == ([], [(30, 0, keys[0])])
    request.num_computed_tokens = 5
    assert planner.step({"a": 4}, lambda _: [30, 31, 32]) == ([], [(31, 1, keys[1])])
    given = planner.finished(request)
    assert given is not None
    assert msgspec.convert(given["pool"], Offer) == Offer(HERE, [0, 1])
    planner.index.check_integrity()


def test_an_offered_prefix_is_fetched_but_for_the_last_token():
    """8 tokens are two blocks, and one token must be left to compute: one block is loaded."""
    planner = a_planner()
    request = Request("a", list(range(8)), kv_transfer_params=an_offer(5, 6))
    assert planner.external_tokens(request, 0) == 4
    planner.allocated(request, [70, 71], 4)
    (load,), saves = planner.step({}, lambda _: [])
    assert (load.peer, load.remote, saves) == (THERE, [5], [])
    assert load.blocks == [(70, 0, prefix_hashes(range(4), BLOCK)[0])]
    planner.loaded(["a"], [])
    assert not planner.index.pool.pins
    assert not planner.loading


def test_what_is_on_its_way_is_waited_for_not_fetched_twice():
    """The second request is asked again later, and then finds the block here."""
    planner = a_planner()
    first = Request("a", list(range(5)), kv_transfer_params=an_offer(5))
    second = Request("b", list(range(5)), kv_transfer_params=an_offer(5))
    planner.allocated(first, [70], planner.external_tokens(first, 0) or 0)
    assert planner.external_tokens(second, 0) is None
    planner.loaded(["a"], [])
    assert planner.external_tokens(second, 0) == 4
    planner.allocated(second, [80], 4)
    assert planner.loading["b"].remote == []


def test_after_a_preemption_the_blocks_are_loaded_into_the_new_table():
    """What is promised again is planned again: nothing is left of the first table."""
    planner = a_planner()
    request = Request("a", list(range(9)))
    computed(planner, Request("before", list(range(9))), [1, 2, 3])
    for table in ([70, 71, 72], [90, 91, 92]):
        tokens = planner.external_tokens(request, 0)
        assert tokens == 8
        planner.allocated(request, table, tokens)
        (load,), _ = planner.step({}, lambda _: [])
        assert [block for block, _, _ in load.blocks] == table[:2]
        planner.loaded(["a"], [])


def test_a_lost_block_is_forgotten():
    """Engine block 71 never came: its key goes, what lies before it stays; nobody asks again."""
    planner = a_planner()
    request = Request("a", list(range(9)), kv_transfer_params=an_offer(5, 6))
    planner.allocated(request, [70, 71, 72], planner.external_tokens(request, 0) or 0)
    planner.loaded(["a"], [71])
    assert list(planner.index.slots) == [prefix_hashes(range(4), BLOCK)[0]]
    assert planner.external_tokens(request, 4) == 0
    planner.index.check_integrity()


def test_no_more_is_promised_than_there_is_room_for():
    """Two slots, both in use by another load: nothing; one of them free again: one block."""
    planner = a_planner(slots=2)
    other = Request("a", list(range(9)), kv_transfer_params=an_offer(1, 2))
    planner.allocated(other, [70, 71, 72], planner.external_tokens(other, 0) or 0)
    request = Request("b", list(range(50, 63)), kv_transfer_params=an_offer(3, 4, 5))
    assert planner.external_tokens(request, 0) == 0
    planner.loaded(["a"], [])
    assert planner.external_tokens(request, 0) == 8


def test_an_aborted_request_leaves_nothing_behind():
    """Its load ends later, and only then its blocks may make room."""
    planner = a_planner()
    request = Request("a", list(range(5)), kv_transfer_params=an_offer(5))
    planner.allocated(request, [70], planner.external_tokens(request, 0) or 0)
    planner.finished(request)
    assert len(planner.index.pool.pins) == 1
    planner.loaded(["a"], [])
    assert not planner.index.pool.pins
    assert not planner.requests
    assert not planner.loading


@pytest.mark.parametrize("params", [{"pool": {"slots": 3}}, {"other": 1}, {"pool": None}])
def test_an_offer_that_cannot_be_read_is_none(params):
    """Such a request is computed like any other."""
    request = Request("a", list(range(9)), kv_transfer_params=params)
    assert a_planner().external_tokens(request, 0) == 0


def test_a_salted_prompt_is_not_shared():
    """Its KV is its own by the wish of its sender."""
    planner = a_planner()
    assert computed(planner, Request("a", list(range(9)), cache_salt="mine"), [1, 2, 3]) is None


def test_roles_are_kept():
    """Who only loads saves nothing; who only saves loads nothing."""
    decoder = a_planner(saves=False)
    assert computed(decoder, Request("a", list(range(9))), [1, 2, 3]) is None
    prefiller = a_planner(loads=False)
    request = Request("a", list(range(9)), kv_transfer_params=an_offer(5, 6))
    assert prefiller.external_tokens(request, 0) == 0


def test_the_longest_unused_block_makes_room():
    """Two slots, three blocks."""
    index = Index(2)
    for block in (1, 2, 3):
        index.release([block]) if index.hold([block]) else None
    assert index.slots == {2: 1, 3: 0}
    index.check_integrity()


def test_a_slot_gives_only_the_block_that_was_put_there():
    """Another key, another model, a changed byte: nothing."""
    buffer = memoryview(bytearray(3 * (HEADER_BYTES + 8)))
    slots = Slots(buffer, b"model---", 8)
    slots.put(1, 77, [memoryview(b"four"), memoryview(b"more")])
    payload = slots.get(1, 77)
    assert payload is not None
    assert bytes(payload) == b"fourmore"
    assert slots.get(1, 78) is None
    assert slots.get(0, 77) is None
    assert Slots(buffer, b"another-", 8).get(1, 77) is None
    buffer[-8 - HEADER_BYTES - 1] ^= 1
    assert slots.get(1, 77) is None
