"""Do we speak the open Conductor's language: events out, events in, and questions?"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from reference_cluster.blocks import prefix_hashes
from reference_cluster.config import ConductorConfig
from reference_cluster.errors import ServeError
from reference_cluster.kvpool.events import (
    Cleared,
    EventError,
    Removed,
    Stored,
    decode,
    encode,
)
from reference_cluster.kvpool.followed import FollowedIndex, Numbering, Subscription
from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.kvpool.published import Announcer, Parents, Publisher
from reference_cluster.kvpool.query import HashQuery, Indexed, QueryError, TokenQuery
from tests.reference_cluster.live import live, wait_until
from tests.reference_cluster.small import a_config

NAMES = ["prefill-0", "prefill-1"]
ANYWHERE = "tcp://127.0.0.1:*"


def an_announcer() -> Announcer:
    return Announcer(NAMES, "cpu", "small", 10)


# ---- the wire --------------------------------------------------------------------------------


def test_an_event_carries_the_names_of_the_rfc_and_of_vllm() -> None:
    """As mooncake_master's: [ts, [map], rank], every field of the envelope, vLLM's aliases."""
    event = Stored(
        event_id=7, block_size=10, backend_id="prefill-0", medium="cpu", seq_hashes=(5, 6)
    )
    ts, [wire], rank = msgspec.msgpack.decode(encode([event], 1.5))
    assert (ts, rank) == (1.5, 0)
    assert wire == {
        "event_id": 7,
        "timestamp": None,
        "event_type": "stored",
        "model_name": None,
        "block_size": 10,
        "additional_salt": None,
        "lora_name": None,
        "tenant_id": "default",
        "backend_id": "prefill-0",
        "medium": "cpu",
        "dp_rank": None,
        "seq_hashes": [5, 6],
        "base_block_idx": None,
        "parent_hash": None,
        "token_ids": None,
        "extra_keys": None,
        "type": "BlockStored",
        "block_hashes": [5, 6],
        "parent_block_hash": None,
        "lora_id": None,
    }


def test_what_is_sent_is_what_is_read() -> None:
    """All three kinds survive the wire."""
    sent = [
        Stored(event_id=0, backend_id="a", seq_hashes=(2**64 - 1, 3), parent_hash=9),
        Removed(event_id=1, backend_id="a", seq_hashes=(3,)),
        Cleared(event_id=2, backend_id="a"),
    ]
    assert decode(encode(sent, 0.0)) == sent


# What vLLM's own structs give, fields in its order: 0.10 to 0.15 as arrays, then as maps.
VLLM_ARRAYS = [
    ["BlockStored", [11, 12], 10, [1, 2, 3, 4], 2, None, "GPU", None],
    ["BlockRemoved", [11], "GPU"],
    ["AllBlocksCleared"],
]
VLLM_MAPS = [
    {
        "type": "BlockStored",
        "block_hashes": [b"\1" * 24 + (11).to_bytes(8, "big"), (12).to_bytes(32, "big")],
        "parent_block_hash": (10).to_bytes(32, "big"),
        "token_ids": [1, 2, 3, 4],
        "block_size": 2,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "group_idx": 0,
    },
    {"type": "BlockRemoved", "block_hashes": [(11).to_bytes(32, "big")], "medium": "GPU"},
    {"type": "AllBlocksCleared"},
]


@pytest.mark.parametrize(
    "batch",
    [
        [0.5, VLLM_ARRAYS],
        [0.5, VLLM_MAPS, 0],
        {"ts": 0.5, "events": VLLM_MAPS, "data_parallel_rank": 0},
    ],
    ids=["arrays", "maps", "all maps"],
)
def test_all_forms_of_vllm_are_read(batch: Any) -> None:
    """Hashes of 32 bytes become their low 64 bits, big-endian, as vLLM's own integers are."""
    stored = Stored(
        block_size=2, medium="GPU", seq_hashes=(11, 12), parent_hash=10, token_ids=(1, 2, 3, 4)
    )
    removed = Removed(medium="GPU", seq_hashes=(11,))
    assert decode(msgspec.msgpack.encode(batch)) == [stored, removed, Cleared()]


def test_kinds_of_the_future_are_passed_over() -> None:
    batch = [0.0, [["BlockTransferred", [1], "GPU", "CPU"], {"event_type": "moved"}]]
    assert decode(msgspec.msgpack.encode(batch)) == []


@pytest.mark.parametrize(
    "batch", [7, [], [0.0, [3]], [0.0, [{"event_type": "stored"}]], [0.0, [{"type": []}]]]
)
def test_nonsense_is_said_to_be_nonsense(batch: Any) -> None:
    with pytest.raises(EventError, match="not a batch of KV events"):
        decode(msgspec.msgpack.encode(batch))


@pytest.mark.parametrize("payload", [b"", b"\xa1\xff", b"\xc1" * 9])
def test_noise_is_nonsense_too(payload: bytes) -> None:
    with pytest.raises(EventError, match="not a batch of KV events"):
        decode(payload)


# ---- our changes as events -------------------------------------------------------------------


def test_a_stored_block_names_the_one_before_it() -> None:
    """Of prompt 1234: 1 begins it, 2 and 3 are there already, 4 follows 3; 9 is of no prompt."""
    announcer = an_announcer()
    announcer.parents.learn([1, 2, 3, 4])
    events = announcer.events("stored", 1, [1, 4, 9])
    assert [
        (one.seq_hashes, one.base_block_idx, one.parent_hash)
        for one in events
        if isinstance(one, Stored)
    ] == [((1,), 0, None), ((4,), None, 3), ((9,), None, None)]


def test_every_instance_numbers_its_events() -> None:
    announcer = an_announcer()
    changes = [("stored", 0), ("removed", 0), ("stored", 1), ("cleared", 0)]
    events = [announcer.events(change, id, [5])[0] for change, id in changes]  # type: ignore[arg-type]
    ids = [(one.backend_id, one.event_id) for one in events]
    assert ids == [("prefill-0", 0), ("prefill-0", 1), ("prefill-1", 0), ("prefill-0", 2)]


def test_blocks_of_unknown_prompts_are_told_together() -> None:
    """As when a worker sends its contents anew: 7 and 8 are of no prompt known, 1 and 2 of one."""
    parents = Parents()
    parents.learn([1, 2])
    assert parents.runs([7, 8, 1, 2, 9, 2]) == [[7, 8], [1, 2], [9], [2]]


def test_parents_of_old_prompts_are_forgotten() -> None:
    """Two generations of at least 3 blocks are kept."""
    parents = Parents(kept=2)
    for prompt in ([1, 2, 3], [4, 5, 6], [7]):
        parents.learn(prompt)
    assert [parents.of(block) for block in (2, 5, 7)] == [None, 4, None]


# ---- strangers' events in our index ----------------------------------------------------------


def test_what_is_followed_equals_what_is_published() -> None:
    """However blocks come, go and are cleared, also when every batch is heard twice."""
    rng = random.Random(5)
    index, followed, announcer = PrefixIndex(2), FollowedIndex(NAMES, 10), an_announcer()

    def repeat_all(*change: Any) -> None:
        for event in 2 * decode(encode(announcer.events(*change), 0.0)):
            followed.apply(event)

    index.on_change = repeat_all
    for _ in range(300):
        id = rng.randrange(2)
        blocks = rng.sample(range(20), 4)
        if rng.random() < 0.05:
            index.cleared(id)
        elif rng.random() < 0.5:
            index.stored(id, blocks)
        else:
            index.evicted(id, [one for one in blocks if index.holds(id, one)])
        assert followed.index.holders == index.holders


def test_a_block_on_two_media_is_held_until_both_let_it_go() -> None:
    """0 stores it on the GPU and offloads it; the media count alone and together."""
    followed = FollowedIndex(["vllm"], 10)

    def matches() -> list[int]:
        return [
            one.match([1])[0] for one in (followed.index, followed.media["GPU"], *cpu(followed))
        ]

    def cpu(followed: FollowedIndex) -> list[PrefixIndex]:
        return [followed.media["CPU"]]

    for medium in ("GPU", "CPU_PINNED"):
        followed.apply(Stored(seq_hashes=(1,), medium=medium), "vllm")
    assert matches() == [1, 1, 1]
    followed.apply(Removed(seq_hashes=(1,), medium="GPU"), "vllm")
    assert matches() == [1, 0, 1]
    followed.apply(Cleared(), "vllm")
    assert matches() == [0, 0, 0]


def test_foreign_hashes_with_tokens_get_our_keys() -> None:
    """vLLM names its blocks as it likes: what they hold is asked for by our hash of the tokens."""
    followed = FollowedIndex(["vllm"], 2)
    tokens = (1, 2, 3, 4, 5, 6)
    ours = prefix_hashes(tokens, 2)
    for hashes, parent, part in (((70, 71), None, tokens[:4]), ((72,), 71, tokens[4:])):
        event = Stored(seq_hashes=hashes, parent_hash=parent, token_ids=part, block_size=2)
        followed.apply(event, "vllm")
    assert followed.index.match(ours) == [3]
    followed.apply(Removed(seq_hashes=(72,)), "vllm")
    assert followed.index.match(ours) == [2]
    followed.apply(Cleared(), "vllm")
    assert (followed.index.holders, followed.keys) == ({}, {})


@pytest.mark.parametrize(
    "strange",
    [
        {"lora_name": "sql"},
        {"additional_salt": "w8a8"},
        {"extra_keys": [["salt"]]},
        {"block_size": 16},
        {"backend_id": "somebody"},
        {"token_ids": (1,) * 10, "parent_hash": 404},
    ],
    ids=lambda strange: next(iter(strange)),
)
def test_what_no_prompt_here_could_use_is_left_out(strange: dict[str, Any]) -> None:
    followed = FollowedIndex(["vllm"], 10)
    followed.apply(Stored(seq_hashes=(1,), **strange), "vllm")
    assert followed.index.holders == {}


def test_numbers_tell_gaps_repeats_and_restarts() -> None:
    """4 is missing; while it is repeated, up to 6, 5 and 6 come by themselves too."""
    numbering = Numbering()
    numbering.expected = 4
    assert numbering.judge(5) == "gap"
    numbering.expected = 7
    assert [numbering.judge(number) for number in (6, 7)] == ["known", "next"]
    assert numbering.judge(0) == "restart"


def test_what_cannot_be_repeated_is_forgotten() -> None:
    """A gap (1), noise (3) and a publisher that starts again (0): only what came since is known."""

    async def main() -> None:
        followed = FollowedIndex(["vllm"], 10)
        subscription = Subscription(followed, "tcp://127.0.0.1:1", name="vllm")
        for number, block in ((0, 1), (2, 2), (3, None), (4, 4), (0, 5)):
            event = Stored(seq_hashes=(block or 0,))
            await subscription.receive(number, encode([event], 0.0) if block else b"noise")
            assert [*followed.index.holders] == ([block] if block else [])

    asyncio.run(main())


# ---- over sockets ----------------------------------------------------------------------------


async def until(is_so: Any, within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not is_so():  # noqa: ASYNC110 - sockets at work set no event
            await asyncio.sleep(0.005)


def a_publisher(index: PrefixIndex, announcer: Announcer | None = None) -> Publisher:
    return Publisher(index, announcer or an_announcer(), ANYWHERE, ANYWHERE, lambda: 0.0)


def address_of(socket: Any) -> str:
    return socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[no-any-return]


def while_published(index: PrefixIndex, what: Any) -> None:
    """Run `what(publisher, subscription)` with both at work."""

    async def main() -> None:
        publisher = a_publisher(index)
        followed = FollowedIndex(NAMES, 10)
        subscription = Subscription(
            followed, address_of(publisher.pub), address_of(publisher.replay)
        )
        tasks: list[asyncio.Task[None]] = [asyncio.create_task(publisher.run())]
        try:
            done: Awaitable[None] = what(publisher, subscription, tasks)
            await done
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            publisher.close()

    asyncio.run(main())


def test_who_comes_late_is_told_what_was_missed() -> None:
    """Stored before anybody listened, repeated; stored after that, heard."""
    index = PrefixIndex(2)

    async def main(publisher: Publisher, subscription: Subscription, tasks: Any) -> None:
        index.stored(0, [1, 2])
        tasks.append(asyncio.create_task(subscription.run()))
        await until(lambda: subscription.followed.index.match([1, 2]) == [2, 0])
        index.stored(1, [1])
        index.evicted(0, [2])
        await until(lambda: subscription.followed.index.match([1, 2]) == [1, 1])
        assert subscription.followed.index.holders == index.holders

    while_published(index, main)


def test_who_has_missed_too_much_is_told_everything_anew() -> None:
    """The first of three batches is kept no more: what it said comes again."""
    index = PrefixIndex(2)

    async def main(publisher: Publisher, subscription: Subscription, tasks: Any) -> None:
        for block in (1, 2, 3):
            index.stored(0, [block])
        publisher.kept.popleft()
        tasks.append(asyncio.create_task(subscription.run()))
        await until(lambda: subscription.numbering.expected >= 3)
        # Who had not joined yet when it was told finds out by the next batch.
        index.stored(1, [1])
        await until(lambda: subscription.followed.index.holders == index.holders)

    while_published(index, main)


def test_a_taken_address_is_said_in_a_line() -> None:
    async def main() -> None:
        first = a_publisher(PrefixIndex(2))
        taken = address_of(first.pub)
        try:
            with pytest.raises(ServeError, match=f"{taken}: Address already in use; give another"):
                Publisher(PrefixIndex(2), an_announcer(), taken, None, lambda: 0.0)
        finally:
            first.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "fields",
    [
        {"publish_events": "tcp://0.0.0.0:5557"},
        {"publish_events": "5557"},
        {"publish_events": "tcp://127.0.0.1:70000"},
        {"replay_events": "tcp://127.0.0.1:5558"},
    ],
)
def test_events_stay_on_this_host(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:PORT|give that too"):
        ConductorConfig(**fields)  # type: ignore[arg-type]


# ---- questions -------------------------------------------------------------------------------


def indexed() -> Indexed:
    """Blocks of 2 tokens: 0 has 12 34 on its GPU and 12 34 56 on its CPU, 1 has 12 on its GPU."""
    followed = FollowedIndex(NAMES, 2)
    keys = prefix_hashes([1, 2, 3, 4, 5, 6], 2)
    for name, medium, count in ((0, "gpu", 2), (0, "cpu", 3), (1, None, 1)):
        followed.apply(Stored(seq_hashes=keys[:count], medium=medium), NAMES[name])
    return Indexed("small", 2, NAMES, followed.index, followed.media)


def ask(**fields: Any) -> Any:
    kind: Any = TokenQuery if "token_ids" in fields else HashQuery
    body = msgspec.json.encode({"model": "small", "block_size": 2, **fields})
    return indexed().answer(body, kind)


def test_a_query_tells_matched_tokens_in_all_and_by_medium() -> None:
    """The seventh token fills no block."""
    first = {"longest_matched": 6, "GPU": 4, "CPU": 6, "DISK": 0, "DP": {"0": 6}}
    second = {"longest_matched": 2, "GPU": 2, "CPU": 0, "DISK": 0, "DP": {"0": 2}}
    assert ask(token_ids=[1, 2, 3, 4, 5, 6, 7]) == {
        "default": {"prefill-0": first, "prefill-1": second}
    }
    hashes = list(prefix_hashes([1, 2, 3, 4, 5, 6], 2))
    assert ask(seq_hashes=hashes, instance_id="prefill-1") == {"default": {"prefill-1": second}}
    assert ask(block_hash=hashes, instance_id="prefill-0") == {"default": {"prefill-0": first}}


def test_others_have_nothing_here() -> None:
    """No instances of another tenant or model, no blocks of an adapter or under a salt."""
    tokens = {"token_ids": [1, 2]}
    assert ask(**tokens, tenant_id="t") == {"t": {}}
    assert ask(**tokens, model="big") == {"default": {}}
    for other in ({"lora_name": "sql"}, {"cache_salt": "w8a8"}):
        found = ask(**tokens, **other)["default"]
        assert [one["longest_matched"] for one in found.values()] == [0, 0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"token_ids": [1], "block_size": 16}, "`block_size` must be 2 here"),
        ({"token_ids": [-1]}, "not a valid query"),
        ({"seq_hashes": "x"}, "not a valid query"),
    ],
)
def test_a_bad_question_is_answered_with_its_remedy(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(QueryError, match=said):
        ask(**fields)


@pytest.mark.live
def test_salted_prompts_share_blocks_among_themselves_only() -> None:
    """The same prompt: nothing is reused under a new salt, and all full blocks under the same."""
    body = {"prompt": [*range(1000, 1035)], "max_tokens": 2}
    question = {"model": "small", "block_size": 10, "token_ids": body["prompt"]}
    with live(a_config()) as (client, _):
        reused = []
        for salt in ({}, {"cache_salt": "a"}, {"cache_salt": "a"}):
            answer = client.post("/v1/completions", json={**body, **salt}).json()
            reused.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert reused == [0, 0, 34]  # Of the same prompt all but the last token is known.
        for salt, tokens in (("a", 30), ("b", 0)):
            found = client.post("/query", json={**question, "cache_salt": salt}).json()
            assert found["default"]["prefill-0"]["longest_matched"] == tokens


@pytest.mark.live
@pytest.mark.timeout(60)
@pytest.mark.parametrize("placement", ["inside", "processes"])
def test_a_live_cluster_is_followed_and_asked(placement: str) -> None:
    """1P+1D: a stranger's index becomes the Conductor's own, and both answer alike."""
    config = a_config(
        conductor={"publish_events": ANYWHERE, "replay_events": ANYWHERE},
        workers={"placement": placement},
    )
    prompt = [*range(1000, 1035)]
    with live(config) as (client, front):
        assert front.publisher is not None
        addresses = [address_of(one) for one in (front.publisher.pub, front.publisher.replay)]
        for tokens in (prompt, prompt[:20] + [7] * 20):
            body = {"prompt": tokens, "max_tokens": 2}
            assert client.post("/v1/completions", json=body).status_code == 200
        question = {"model": "small", "block_size": 10, "token_ids": prompt}
        answer = client.post("/query", json=question).json()
        expected = {"longest_matched": 30, "GPU": 0, "CPU": 30, "DISK": 0, "DP": {"0": 30}}
        assert answer == {"default": {"prefill-0": expected}}
        by_hash = {**question, "seq_hashes": list(prefix_hashes(prompt, 10))[:3]}
        assert client.post("/query_by_hash", json=by_hash).json() == answer
        assert client.post("/query", json={**question, "block_size": 16}).status_code == 400

        followed = FollowedIndex(["prefill-0"], 10)

        async def follow() -> None:
            task = asyncio.create_task(Subscription(followed, *addresses).run())
            await until(lambda: followed.index.holders == front.cluster.index.holders)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(follow())
        wait_until(lambda: len(followed.index.holders) == 6)
        asked = Indexed("small", 10, ["prefill-0"], followed.index, followed.media)
        assert asked.answer(msgspec.json.encode(question), TokenQuery) == answer
