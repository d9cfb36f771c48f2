"""How much does the pool's bookkeeping add to a read of one block's bytes from a local replica?

    .venv/bin/python tests/bench/pool_get.py [--check] [--kv-bytes-per-token 4096]

Raw: `ShmTransport.read` of a 512-token block between two segments, the ranges known. Pool: look the
block up at its holder and hold its slot, take one here, read, store it in this pool, and let go of
both. In turns, medians of 300 each. `--check` ends with 1 where the pool takes more than 1.2 times
as long. A checksum of the block, as `verify` takes it, is timed apart.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time

from rich.console import Console

from reference_cluster.kvpool.memory import BlockMemory, PoolBytes
from reference_cluster.kvpool.pool import BlockPool
from reference_cluster.transports.bytes import Segment
from reference_cluster.transports.shm import ShmTransport

BLOCK_TOKENS, LAYERS, SLOTS, ROUNDS, RATIO_MAX = 512, 80, 16, 300, 1.2

results = Console()


async def measure(block_bytes: int) -> tuple[float, float, float]:
    """Median seconds of a raw read, of a get through the pools, and of a checksum."""
    segments = [Segment.create(2 * SLOTS * block_bytes, "mcb-bench-") for _ in range(2)]
    ours, theirs = (
        PoolBytes(
            BlockMemory(one.buffer[: SLOTS * block_bytes], LAYERS, block_bytes // LAYERS),
            BlockPool(SLOTS - 2),
        )
        for one in segments
    )
    transport, holder = ShmTransport(), ShmTransport()
    await transport.start(segments[0])
    peer = await holder.start(segments[1])
    slots = theirs.memory.take(1)
    assert slots is not None
    for slot in slots:
        theirs.memory.view(slot)[:] = bytes(range(256)) * (block_bytes // 256)
    theirs.put([7], slots)
    raw_s, pool_s, checksum_s = [], [], []
    clock = time.perf_counter
    source = theirs.memory.range_of(slots[0])
    for turn in range(ROUNDS):
        # The raw read goes round as many slots, behind the pool's, so that caches help both alike.
        target = ours.memory.range_of(SLOTS + turn % (SLOTS - 2))
        begin_s = clock()
        await transport.read(peer, [source], [target], 1.0)
        raw_s.append(clock() - begin_s)
        begin_s = clock()
        held, taken = theirs.get([7]), ours.memory.take(1)
        assert taken is not None
        ranges = [theirs.memory.range_of(slot) for slot in held]
        await transport.read(peer, ranges, [ours.memory.range_of(slot) for slot in taken], 1.0)
        ours.pool.unpin([turn][: ours.put([turn], taken)])
        ours.memory.give_back(taken)
        theirs.memory.give_back(held)
        pool_s.append(clock() - begin_s)
        begin_s = clock()
        ours.memory.checksum(ours.slots[turn])
        checksum_s.append(clock() - begin_s)
    for one in (transport, holder):
        await one.close()
    del ours, theirs
    for segment in segments:
        segment.close()
    return statistics.median(raw_s), statistics.median(pool_s), statistics.median(checksum_s)


def main() -> int:
    """Measure, print; the exit code."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--check", action="store_true")
    options.add_argument("--kv-bytes-per-token", type=int, default=4096)
    chosen = options.parse_args()
    layer_bytes = BLOCK_TOKENS * chosen.kv_bytes_per_token // LAYERS // 256 * 256
    block_bytes = LAYERS * layer_bytes
    raw_s, pool_s, checksum_s = asyncio.run(measure(block_bytes))
    results.print(
        f"{block_bytes / 2**20:.2f} MiB a block: raw {raw_s * 1e6:.0f} us, "
        f"pool {pool_s * 1e6:.0f} us ({pool_s / raw_s:.2f}x), "
        f"checksum {checksum_s * 1e6:.0f} us"
    )
    return 1 if chosen.check and pool_s > RATIO_MAX * raw_s else 0


if __name__ == "__main__":
    sys.exit(main())
