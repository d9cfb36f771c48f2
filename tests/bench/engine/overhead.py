"""How much of a decode step is not the model's? Scheduling, tensors, bookkeeping, at batch 8.

    OMP_NUM_THREADS=1 python tests/bench/engine/overhead.py [--context 64] [--batch 8]

The median share of a step's CPU time that is spent neither in the forward pass nor in choosing the
tokens. What Python costs between the operators of the pass is not in it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from typing import Any

import torch

from reference_cluster.engines.torch import runner as runner_module
from reference_cluster.engines.torch.replica import ReplicaConfig, build_runner
from reference_cluster.engines.torch.scheduler import Scheduler
from reference_cluster.request import Sampling

STEPS = 60


class Timed:
    """A function that adds up the CPU time spent in it."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        start_s = time.process_time()
        result = self.function(*arguments)
        self.seconds += time.process_time() - start_s
        return result


def decoding(batch: int, context: int) -> Scheduler:
    torch.set_num_threads(1)
    numbers = random.Random(0)
    scheduler = Scheduler(build_runner(ReplicaConfig(kv_tokens=40960)))
    for number in range(batch):
        prompt = [numbers.randrange(3, 4000) for _ in range(context)]
        scheduler.add(number, prompt, Sampling(10 * STEPS, ignore_eos=True))
    while len(scheduler.step()) < batch:
        pass
    for _ in range(20):
        scheduler.step()
    return scheduler


def step_s(scheduler: Scheduler) -> float:
    start_s = time.process_time()
    scheduler.step()
    return time.process_time() - start_s


def beside_the_pass(scheduler: Scheduler) -> float:
    forward = scheduler.runner.model.forward = Timed(scheduler.runner.model.forward)
    choose = runner_module.choose = Timed(runner_module.choose)
    shares = []
    for _ in range(STEPS):
        forward.seconds = choose.seconds = 0.0
        whole_s = step_s(scheduler)
        shares.append(1 - (forward.seconds + choose.seconds) / whole_s)
    scheduler.runner.model.forward, runner_module.choose = forward.function, choose.function
    return statistics.median(shares)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--context", type=int, default=64)
    chosen = arguments.parse_args()
    scheduler = decoding(chosen.batch, chosen.context)
    alone_s = statistics.median(step_s(scheduler) for _ in range(STEPS))
    sys.stdout.write(
        f"batch {chosen.batch} context {chosen.context}: {alone_s * 1e3:.2f} ms a step, "
        f"{beside_the_pass(scheduler):.1%} of it beside the pass and the choice\n"
    )


if __name__ == "__main__":
    main()
