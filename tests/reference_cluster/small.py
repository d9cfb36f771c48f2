"""How do tests make clusters so small that every time can be worked out by hand?

The small profile: a prefill takes 0.1 s and 1 ms a token that must be computed, a decode step 0.1 s
whatever the batch, a token's KV has 100 bytes in 4 layers, and a link carries 1 MB/s (10,000
tokens a second). Blocks have 10 tokens.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from reference_cluster.cluster import Cluster
from reference_cluster.colocated import ColocatedInstance
from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import CostModel, DecodeCost, PrefillCost, Profile
from reference_cluster.decode import DecodeInstance
from reference_cluster.policies.view import DecodeView, DecodeViews, PrefillView, PrefillViews
from reference_cluster.request import Block, Request, Timeline
from reference_cluster.simulate import sleep_until
from reference_cluster.virtual_time import run_virtual

T = TypeVar("T")
BLOCK_TOKENS = 10
SMALL = Profile(
    name="small",
    model="none",
    node="none",
    source="a test",
    error="none",
    prefill=PrefillCost(base_s=0.1, token_s=1e-3, token2_s=0.0),
    decode=DecodeCost(base_s=0.1, sequence_s=0.0, context_token_s=0.0),
    layers=4,
    kv_bytes_per_token=100,
    device_kv_tokens=100_000,
    dram_kv_tokens=100_000,
    link_bytes_per_s=1e6,
)


def a_profile(**changes: Any) -> Profile:
    """The small profile with other fields; those of sections are dicts of changes."""
    for name in ("prefill", "decode", "overheads"):
        if name in changes:
            changes[name] = msgspec.structs.replace(getattr(SMALL, name), **changes[name])
    return msgspec.structs.replace(SMALL, **changes)


def costs(**changes: Any) -> CostModel:
    return CostModel(a_profile(**changes))


def a_config(**fields: Any) -> ClusterConfig:
    """A cluster of 1P+1D unless told otherwise; sections are given as dicts."""
    small = {
        "prefill_instances": 1,
        "decode_instances": 1,
        "colocated_instances": 1,
        "block_tokens": BLOCK_TOKENS,
        "slo": {"ttft_s": 1e6, "tbt_s": 1e6},
        "workers": {"placement": "inside"},
    }
    return msgspec.convert({**small, **fields}, ClusterConfig)


def a_request(
    id: int = 0,
    input_tokens: int = 100,
    output_tokens: int = 5,
    arrived_s: float = 0.0,
    blocks: Sequence[Block] | None = None,
    block_tokens: int = BLOCK_TOKENS,
) -> Request:
    """A request that shares no prefix with any other, unless `blocks` says so."""
    if blocks is None:
        blocks = [(id, position) for position in range(-(-input_tokens // block_tokens))]
    assert len(blocks) == -(-input_tokens // block_tokens), "one key a block"
    return Request(id, input_tokens, output_tokens, blocks, Timeline(arrived_s))


# An empty decode instance, as the Conductor sees it.
ROOMY = DecodeView(
    id=0,
    name="decode-0",
    batch=0,
    context_tokens=0,
    expected=0,
    expected_tokens=0,
    free_tokens=10**6,
)


def prefill_views(*views: PrefillView) -> PrefillViews:
    """These rows as columns; their ids are 0, 1, 2 and so on."""
    queue_s = np.array([one.queue_s for one in views])
    context_tokens = np.array([one.context_tokens for one in views])
    reads = [one.read_s for one in views]
    reused = [(one.reused_tokens, 1 << one.id) for one in views]
    return PrefillViews(queue_s, reused, context_tokens, reads.__getitem__ if any(reads) else None)


def decode_views(*views: DecodeView) -> DecodeViews:
    """These rows as columns."""
    names = ("batch", "context_tokens", "expected", "expected_tokens", "free_tokens")
    return DecodeViews(*(np.array([getattr(one, name) for one in views]) for name in names))


# All terms of the cost model at work, and numbers that no two sums of coincide.
ROUGH = msgspec.structs.replace(
    SMALL,
    name="rough",
    prefill=PrefillCost(base_s=0.0681, token_s=1.096e-3, token2_s=7.43e-8, reused_token_s=2.574e-5),
    decode=DecodeCost(base_s=26.3e-3, sequence_s=1.51e-3, context_token_s=3.46e-6),
    chunk_factor=1.2,
)


def random_requests(
    seed: int,
    count: int,
    mean_gap_s: float = 0.1,
    input_max: int = 600,
    output_max: int = 60,
    families: int = 4,
    first_id: int = 0,
) -> list[Request]:
    """Requests at random times that share prefixes within families; keys are strings.

    Each has its family's blocks up to a random depth, then its own.
    """
    rng = random.Random(seed)
    requests, at_s = [], 0.0
    for id in range(first_id, first_id + count):
        at_s += rng.expovariate(1 / mean_gap_s)
        input_tokens = 1 + int(input_max * rng.random() ** 2)
        blocks, family = -(-input_tokens // BLOCK_TOKENS), rng.randrange(families)
        shared = rng.randrange(blocks + 1)
        keys = [f"family-{family}-{position}" for position in range(shared)]
        keys += [f"request-{id}-{position}" for position in range(shared, blocks)]
        output_tokens = 1 + int(output_max * rng.random() ** 2)
        requests.append(a_request(id, input_tokens, output_tokens, at_s, keys))
    return requests


Script = Callable[[Cluster], Awaitable[T]]


def with_cluster(
    config: ClusterConfig,
    script: Script[T],
    profile: Profile = SMALL,
    ended: Callable[[Request], None] = lambda request: None,
    steps_max: int | None = None,
) -> T:
    """Run `script` beside a cluster in virtual time. Whatever fails there fails the test."""

    crashes: list[BaseException] = []

    def on_crash(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        crashes.append(context.get("exception") or RuntimeError(context["message"]))

    async def main() -> T:
        asyncio.get_running_loop().set_exception_handler(on_crash)
        cluster = Cluster(config, profile, ended, steps_max)
        serving = asyncio.create_task(cluster.run(), name="cluster")
        acting = asyncio.ensure_future(script(cluster))
        acting.add_done_callback(lambda _: serving.cancel())
        serving.add_done_callback(lambda _: acting.cancel())
        await asyncio.gather(serving, return_exceptions=True)
        if not serving.cancelled():
            await serving  # Raises what crashed it.
        result = await acting
        if crashes:
            raise crashes[0]  # A callback failed, of which asyncio only makes a note.
        return result

    return run_virtual(main())


def held(cluster: Cluster) -> list[str]:
    """What the parts of a cluster still hold or do for somebody; nothing when all has ended."""
    found = {f"{len(cluster.in_flight)} requests in flight": bool(cluster.in_flight)}
    for prefill in cluster.prefill:
        found[f"{prefill.name} has a queue"] = bool(prefill.queue or prefill.running)
        found[f"{prefill.name} predicts {prefill.backlog_s} s"] = prefill.backlog_s != 0.0
        found[f"{prefill.name} promises {prefill.promised}"] = bool(prefill.promised)
        found[f"{prefill.name} pins {prefill.pool.pins}"] = bool(prefill.pool.pins)
        found[f"{prefill.name} lends"] = bool(prefill.lending)
    for decode in cluster.decode:
        found[f"{decode.name} expects {decode.expected}"] = bool(decode.expected)
        expected = decode.expected_tokens, decode.expected_kv_tokens
        found[f"{decode.name} expects {expected} tokens"] = expected != (0, 0)
    for colocated in cluster.colocated:
        found[f"{colocated.name} has prompts"] = bool(colocated.started)
        found[f"{colocated.name} predicts"] = bool(colocated.predicted_s)
        found[f"{colocated.name} holds memory"] = bool(colocated.memory)
        found[f"{colocated.name} pins {colocated.pool.pins}"] = bool(colocated.pool.pins)
        found[f"{colocated.name} reserves"] = colocated.pool.reserved != 0
    batching: list[DecodeInstance | ColocatedInstance] = [*cluster.decode, *cluster.colocated]
    for instance in batching:
        batch = instance.batch
        tokens = batch.context_tokens, batch.kv_tokens
        found[f"{instance.name} decodes"] = bool(batch.members or batch.listening)
        found[f"{instance.name} holds {tokens} tokens"] = tokens != (0, 0)
        found[f"{instance.name} makes {instance.waiting} wait"] = bool(instance.waiting)
    if cluster.prefill:
        for link in [*cluster.transport.sending, *cluster.transport.receiving]:
            found["a link carries bytes"] = bool(link.flows)
    return [what for what, is_so in found.items() if is_so]


async def settled(cluster: Cluster, within_s: float = 1e6) -> None:
    """Sleep until nothing is held any more; what is held after `within_s` is held for ever."""
    loop = asyncio.get_running_loop()
    end_s, nap_s = loop.time() + within_s, 0.1
    while what := held(cluster):
        assert loop.time() < end_s, f"for ever: {', '.join(what)}"
        await asyncio.sleep(nap_s)
        nap_s *= 2
    cluster.check_integrity()


Look = Callable[[Cluster], object]


def served(
    config: ClusterConfig,
    requests: Sequence[Request],
    cancels: Sequence[tuple[float, Request]] = (),
    profile: Profile = SMALL,
    steps_max: int | None = None,
    looks: Sequence[tuple[float, Look]] = (),
) -> Cluster:
    """Offer requests at their times, cancel some and look at times, wait until nothing is held."""
    moments: list[tuple[float, Look]] = [
        (one.timeline.arrived_s, methodcaller("submit", one)) for one in requests
    ]
    moments += [(at_s, methodcaller("cancel", one)) for at_s, one in cancels]
    moments += looks

    async def script(cluster: Cluster) -> Cluster:
        for at_s, action in sorted(moments, key=lambda moment: moment[0]):
            await sleep_until(at_s)
            action(cluster)
        await settled(cluster)
        return cluster

    return with_cluster(config, script, profile, steps_max=steps_max)


def write_profile(path: Path, profile: Profile = SMALL) -> Path:
    """The profile as a TOML file. Its strings and numbers look in TOML as they do in JSON."""
    lines, sections = [], []
    for name, value in msgspec.to_builtins(profile).items():
        if isinstance(value, dict):
            sections += [f"[{name}]", *(f"{key} = {json.dumps(it)}" for key, it in value.items())]
        else:
            lines.append(f"{name} = {json.dumps(value)}")
    path.write_text("\n".join([*lines, *sections]))
    return path
