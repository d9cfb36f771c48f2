"""How many requests can the Conductor place in a second, and how does that depend on the cluster?

    .venv/bin/python tests/bench/conductor.py [--check] [--requests 4000]

For each size of cluster the prefix index is filled with a million blocks (every instance holds its
share, whole chains that begin with the same block), then requests arrive so that the instances are
busy for 70 % of the time: conversation-like ones of 24 blocks on average, and every tenth of 126,000
tokens (247 blocks). The cluster runs in virtual time; what is timed is the Conductor's own work for
a request, on the host's clock: `Conductor.decide`, its promises, and the index taking in the blocks
that were stored and evicted for it. `--check` ends with 1 where a bound is broken: 5,000 placements
a second with 20 prefill instances, 2 ms for 99 % of the long prompts, 200 bytes a block, and 1,000
instances at most 3 times as dear as 20.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from reference_cluster.cluster import Cluster
from reference_cluster.config import ClusterConfig, ConductorConfig, PrefillConfig
from reference_cluster.cost_model import Profile, load_profile
from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.request import Request, Timeline
from reference_cluster.simulate import sleep_until
from reference_cluster.virtual_time import run_virtual

BLOCKS = 1_000_000
BLOCK_TOKENS = 512
LONG_TOKENS = 126_195  # The conversation trace's longest prompt.
SIZES = (8, 20, 100, 1000)
PLACEMENTS_PER_S_MIN, LONG_P99_S_MAX, BYTES_MAX, GROWTH_MAX = 5000, 2e-3, 200, 3.0

results = Console()


class Timed:
    """Adds up the host seconds spent in some callables."""

    def __init__(self) -> None:
        self.spent_s = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        clock = time.perf_counter

        def timed(*arguments: Any) -> Any:
            begin_s = clock()
            result = function(*arguments)
            self.spent_s += clock() - begin_s
            return result

        return timed


def chains(count: int, rng: random.Random) -> list[list[int]]:
    """Prompts as block keys: one block is everybody's, and one prompt in three goes on another's."""
    made: list[list[int]] = []
    for number in range(count):
        blocks = 247 if number % 10 == 0 else 1 + min(200, int(rng.expovariate(1 / 18)))
        shared = made[rng.randrange(len(made))] if made and rng.random() < 1 / 3 else [1]
        kept = shared[: max(1, int(len(shared) * rng.random() * 1.5))][:blocks]
        made.append(kept + [rng.getrandbits(64) for _ in range(blocks - len(kept))])
    return made


def fill(cluster: Cluster, rng: random.Random) -> list[list[int]]:
    """A million blocks, in chains that one instance has each, and a few have in several places.

    The pools are as large as that, so that what comes later evicts.
    """
    prompts: list[list[int]] = []
    while any(one.pool.free > one.pool.capacity / 50 for one in cluster.prefill):
        for prompt in chains(500, rng):
            for _ in range(1 if rng.random() < 0.9 else 3):
                pool = rng.choice(cluster.prefill).pool
                held = pool.match(prompt)
                pool.pin(prompt[:held])
                pool.unpin(prompt[: held + pool.store_pinned(prompt[held:])])
            if len(prompts) < 20_000:
                prompts.append(prompt)
    return prompts


def requests(count: int, prompts: list[list[int]], instances: int, seed: int) -> list[Request]:
    """Half of them continue a prompt that somebody has, half are new but for the first block."""
    rng, made, at_s = random.Random(seed), [], 0.0
    gap_s = 3.0 / 0.7 / instances  # A mean prefill takes about 3 s (every tenth is very long).
    for id in range(count):
        at_s += rng.expovariate(1 / gap_s)
        tokens = LONG_TOKENS if id % 10 == 0 else 1 + min(100_000, int(rng.expovariate(1 / 9000)))
        blocks = -(-tokens // BLOCK_TOKENS)
        shared = rng.choice(prompts) if rng.random() < 0.5 else [1]
        keys = shared[:blocks]
        keys += [rng.getrandbits(64) for _ in range(blocks - len(keys))]
        made.append(Request(id, tokens, 1 + int(rng.expovariate(1 / 340)), keys, Timeline(at_s)))
    return made


def measure(instances: int, count: int, profile: Profile, **conductor: Any) -> dict[str, float]:
    """Host seconds a placement, mean and of the long ones, in a cluster of that many of each."""
    spent: list[float] = []
    longs: list[float] = []

    async def main() -> None:
        dram = PrefillConfig(dram_tokens=BLOCKS // instances * BLOCK_TOKENS)
        config = ClusterConfig(
            prefill_instances=instances,
            decode_instances=instances,
            prefill=dram,
            conductor=ConductorConfig(**conductor),
        )
        cluster = Cluster(config, profile, lambda request: None)
        rng = random.Random(3)
        prompts = fill(cluster, rng)
        timed = Timed()
        one = cluster.conductor
        one.decide = timed.around(one.decide)  # type: ignore[method-assign]
        for prefill in cluster.prefill:
            pool = prefill.pool
            pool.on_stored, pool.on_evicted = map(timed.around, (pool.on_stored, pool.on_evicted))
        gc.collect()
        gc.freeze()
        import asyncio

        serving = asyncio.create_task(cluster.run(), name="cluster")
        warm = count // 4
        for request in requests(count + warm, prompts, instances, seed=5):
            await sleep_until(request.timeline.arrived_s)
            before_s = timed.spent_s
            cluster.submit(request)
            # What was stored and evicted since the last request came is this one's share.
            if request.id >= warm:
                spent.append(timed.spent_s - last_s)
                if request.input_tokens == LONG_TOKENS:
                    longs.append(timed.spent_s - before_s)
            last_s = timed.spent_s
        serving.cancel()

    run_virtual(main())
    return {
        "mean_s": statistics.fmean(spent),
        "p99_s": statistics.quantiles(spent, n=100)[-1],
        "long_p99_s": statistics.quantiles(longs, n=100)[-1],
    }


def index_bytes(instances: int) -> float:
    """Bytes a block of an index with a million, keys included; each has one holder, one in ten 3."""
    rng = random.Random(1)
    gc.collect()
    tracemalloc.start()
    index = PrefixIndex(instances)
    for _ in range(BLOCKS // 25):
        chain = [rng.getrandbits(64) for _ in range(25)]
        for _ in range(1 if rng.random() < 0.9 else 3):
            index.stored(rng.randrange(instances), chain)
        del chain
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return size / len(index.holders)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--check", action="store_true")
    options.add_argument("--requests", type=int, default=4000)
    options.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    chosen = options.parse_args()
    profile = load_profile("a800-llama3-70b")
    table = Table("instances", "placements/s", "mean us", "p99 us", "126k prompt p99 us", "bytes")
    for instances in chosen.sizes:
        found = measure(instances, chosen.requests, profile)
        table.add_row(
            f"{instances}P+{instances}D",
            f"{1 / found['mean_s']:,.0f}",
            f"{found['mean_s'] * 1e6:.0f}",
            f"{found['p99_s'] * 1e6:.0f}",
            f"{found['long_p99_s'] * 1e6:.0f}",
            f"{index_bytes(instances):.0f}",
        )
    results.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
