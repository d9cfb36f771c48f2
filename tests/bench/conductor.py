"""How many requests can the Conductor place in a second, and how does that grow with the cluster?

    .venv/bin/python tests/bench/conductor.py [--check] [--requests 2000] [--sizes 8 20 100 1000]

For each size the pools, and with them the prefix index, are filled with a million blocks: chains
that begin with the same block, one prompt in three going on where another did, one in ten in three
places. Then requests come, so many that prefill is busy for 70 % of the time: every tenth has
126,195 tokens (247 blocks), half go on where an earlier prompt did. The cluster runs in virtual
time; what is timed, on the host's clock, is the Conductor's own work for a request:
`Conductor.decide`, the promises of what was placed, and the index taking in what was stored and
evicted meanwhile.

`--check` ends with 1 where a bound is broken: 5,000 placements a second with 20 prefill instances,
2 ms for 99 % of the long prompts there, 200 bytes a block, and a placement with 1,000 instances at
most 3 times as dear as with 20.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from reference_cluster.cluster import Cluster
from reference_cluster.config import ClusterConfig, PrefillConfig
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
    """Prompts as block keys."""
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


async def measured(instances: int, count: int, profile: Profile) -> tuple[list[float], list[float]]:
    """Host seconds of every placement, and of `decide` alone for the long prompts."""
    dram = PrefillConfig(dram_tokens=BLOCKS // instances * BLOCK_TOKENS)
    config = ClusterConfig(prefill_instances=instances, decode_instances=instances, prefill=dram)
    cluster = Cluster(config, profile, lambda request: None)
    prompts = fill(cluster, random.Random(3))
    timed, deciding = Timed(), Timed()
    conductor, index = cluster.conductor, cluster.conductor.index
    conductor.decide = timed.around(deciding.around(conductor.decide))  # type: ignore[method-assign]
    for name in ("add", "remove"):  # What is stored, evicted, promised and settled.
        setattr(index, name, timed.around(getattr(index, name)))
    gc.collect()
    gc.freeze()
    serving = asyncio.create_task(cluster.run(), name="cluster")
    warm, last_s = count // 4, 0.0
    placements: list[float] = []
    longs: list[float] = []
    for request in requests(count + warm, prompts, instances, seed=5):
        await sleep_until(request.timeline.arrived_s)
        before_s = deciding.spent_s
        cluster.submit(request)
        if request.id >= warm:
            # What the index took in since the last request came is this one's share.
            placements.append(timed.spent_s - last_s)
            if request.input_tokens == LONG_TOKENS:
                longs.append(deciding.spent_s - before_s)
        last_s = timed.spent_s
    serving.cancel()
    gc.unfreeze()
    return placements, longs


def index_bytes(instances: int) -> tuple[float, float]:
    """Bytes a block of an index with a million, keys included, as Python and the system count them.

    Every block has one holder, one in ten has three.
    """
    rng = random.Random(1)
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    tracemalloc.start()
    filled = PrefixIndex(instances)
    fill_index(filled, rng)
    traced = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    blocks = len(filled.holders)
    del filled
    gc.collect()
    before = process.memory_info().rss
    again = PrefixIndex(instances)
    fill_index(again, rng)
    resident = process.memory_info().rss - before
    return traced / blocks, resident / len(again.holders)


def fill_index(index: PrefixIndex, rng: random.Random) -> None:
    """A million blocks in chains of 25."""
    for _ in range(BLOCKS // 25):
        chain = [rng.getrandbits(64) for _ in range(25)]
        for _ in range(1 if rng.random() < 0.9 else 3):
            index.stored(rng.randrange(index.instances), chain)


def main() -> int:
    """Measure, print; the exit code."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--check", action="store_true")
    options.add_argument("--requests", type=int, default=2000)
    options.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    chosen = options.parse_args()
    profile = load_profile("a800-llama3-70b")
    columns = "placements/s", "mean us", "p99 us", "126k prompt p99 us", "bytes a block", "resident"
    table = Table("instances", *columns)
    means: dict[int, float] = {}
    broken: list[str] = []
    for instances in chosen.sizes:
        traced, resident = in_a_process_of_its_own(index_bytes, instances)
        run = run_virtual(measured(instances, chosen.requests, profile))
        placements, _ = run
        mean_s = means[instances] = statistics.fmean(placements)
        p99_s, long_s = (statistics.quantiles(one, n=100)[-1] for one in run)
        figures = 1 / mean_s, mean_s * 1e6, p99_s * 1e6, long_s * 1e6, traced, resident
        table.add_row(f"{instances}P+{instances}D", *(f"{one:,.0f}" for one in figures))
        if instances == 20:
            broken += [f"{1 / mean_s:,.0f} placements/s"] * (1 / mean_s < PLACEMENTS_PER_S_MIN)
            broken += [f"{long_s * 1e3:.1f} ms for a long prompt"] * (long_s > LONG_P99_S_MAX)
        broken += [f"{resident:.0f} bytes a block"] * (max(traced, resident) > BYTES_MAX)
    results.print(table)
    if 20 in means and 1000 in means:
        growth = means[1000] / means[20]
        results.print(f"a placement with 1,000 instances is {growth:.2f} times as dear as with 20")
        broken += [f"growth of {growth:.2f}"] * (growth > GROWTH_MAX)
    for what in broken:
        results.print(f"beyond its bound: {what}")
    return 1 if chosen.check and broken else 0


def in_a_process_of_its_own(function: Callable[[int], Any], argument: int) -> Any:
    """Its memory is then nobody else's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, argument).result()


if __name__ == "__main__":
    sys.exit(main())
