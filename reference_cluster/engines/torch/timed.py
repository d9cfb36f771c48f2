"""How long does a replica take when nothing else is asked of it? Prompts, prefixes, batches."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable

import torch

from reference_cluster.engines.torch.blocks import KvBlocks, Moves
from reference_cluster.engines.torch.replica import ReplicaConfig, build_runner
from reference_cluster.engines.torch.scheduler import Job, Scheduler
from reference_cluster.request import Sampling

FIRST_TOKEN = 3  # Ids from here on are plain ones in every vocabulary.


class TimedReplica:
    """One replica in this process, its prompts' KV written to blocks as a prefill worker does.

    Times are seconds of the clock `now_s`: keep the machine quiet. Raises ConfigError.
    """

    def __init__(
        self,
        config: ReplicaConfig,
        block_tokens: int,
        chunk_tokens: int,
        seed: int,
        now_s: Callable[[], float],
    ) -> None:
        torch.set_num_threads(1)
        self.scheduler = Scheduler(build_runner(config), chunk_tokens)
        self.block_tokens = block_tokens
        self.now_s = now_s
        self.numbers = random.Random(seed)
        self.ids = itertools.count()

    def prompt(self, tokens: int) -> list[int]:
        past = self.scheduler.runner.model.config.vocabulary
        return [self.numbers.randrange(FIRST_TOKEN, past) for _ in range(tokens)]

    def prefill(self, tokens: int, hit: float, repeats: int) -> tuple[int, float]:
        """Tokens reused of a prompt of which the share `hit` is known, and seconds it took."""
        reused = int(tokens * hit) // self.block_tokens * self.block_tokens
        slots = range(-(-tokens // self.block_tokens))
        blocks = self.blocks(len(slots))
        seconds = []
        for _ in range(repeats):
            prompt = self.prompt(tokens)
            if reused:
                self.run(self.add(prompt, 1, Moves(blocks, slots, tokens)))
                prompt = prompt[:reused] + self.prompt(tokens - reused)
            job = self.add(prompt, 1, Moves(blocks, slots, tokens, reused))
            start_s = self.now_s()
            self.run(job)
            seconds.append(self.now_s() - start_s)
        return reused, statistics.median(seconds)

    def decode(self, batch: int, context: int, steps: int, repeats: int) -> tuple[float, float]:
        """Tokens of context of all sequences in the middle of the steps, and the median step."""
        seconds = []
        for _ in range(repeats):
            jobs = [self.add(self.prompt(context), steps + batch + 2) for _ in range(batch)]
            while len(self.scheduler.step()) < batch:
                pass
            for _ in range(steps):
                start_s = self.now_s()
                self.scheduler.step()
                seconds.append(self.now_s() - start_s)
            for job in jobs:
                self.scheduler.cancel(job)
        return batch * (context + steps / 2), statistics.median(seconds)

    def blocks(self, count: int) -> KvBlocks:
        runner = self.scheduler.runner
        config, cache = runner.model.config, runner.cache
        size = count * self.block_tokens * config.kv_bytes(cache.kv.dtype.itemsize)
        return KvBlocks(bytearray(size), config, cache.kv.dtype, self.block_tokens, cache)

    def add(self, prompt: list[int], output_tokens: int, moves: Moves | None = None) -> Job:
        wish = Sampling(output_tokens, ignore_eos=True)
        return self.scheduler.add(next(self.ids), prompt, wish, moves)

    def run(self, job: Job) -> None:
        while job.finish is None:
            self.scheduler.step()
