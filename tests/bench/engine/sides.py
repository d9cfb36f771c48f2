"""How long do the two engines take for the same work? One side of the comparison: a child process.

Reads one JSON command a line, answers with one: {"work": "prefill", "tokens": 512} or
{"work": "decode", "batch": 8, "context": 64, "steps": 20} -> {"cpu_s": [...]}: CPU seconds of the
whole process for each prefill, or for each decode step.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

VOCABULARY = 4000  # Token ids 3..3999 are plain ones in the tiny model.
KV_TOKENS = 32 * 2304
CHUNK_TOKENS = 2048


class Side(Protocol):
    def add(self, prompt: list[int], output_tokens: int) -> None: ...

    def step(self) -> int:
        """One step; how many requests have given a token in it."""

    def clear(self) -> None:
        """Forget all requests."""


class Ours:
    def __init__(self, model: str) -> None:
        import torch

        from reference_cluster.engines.torch.replica import ReplicaConfig, build_runner
        from reference_cluster.engines.torch.scheduler import Scheduler

        torch.set_num_threads(1)
        settings = ReplicaConfig(model, dtype="float32", kv_tokens=KV_TOKENS)
        self.scheduler = Scheduler(build_runner(settings), step_tokens_max=CHUNK_TOKENS)
        self.ids = 0

    def add(self, prompt: list[int], output_tokens: int) -> None:
        from reference_cluster.request import Sampling

        self.ids += 1
        self.scheduler.add(self.ids, prompt, Sampling(output_tokens, ignore_eos=True))

    def step(self) -> int:
        return len(self.scheduler.step())

    def clear(self) -> None:
        for job in [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.cancel(job)


class Vllm:
    def __init__(self, model: str) -> None:
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_HOST_IP="127.0.0.1",
            VLLM_LOGGING_LEVEL="ERROR",
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
        )
        from vllm import LLM

        llm = LLM(
            model,
            dtype="float32",
            enforce_eager=True,
            max_model_len=8200,
            max_num_batched_tokens=CHUNK_TOKENS,
            max_num_seqs=64,
            kv_cache_memory_bytes=KV_TOKENS * 4096,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self.engine = llm.llm_engine
        self.ids = 0
        self.live: list[str] = []

    def add(self, prompt: list[int], output_tokens: int) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
        self.ids += 1
        self.live.append(f"r{self.ids}")
        self.engine.add_request(self.live[-1], {"prompt_token_ids": prompt}, sampling)

    def step(self) -> int:
        return len(self.engine.step())

    def clear(self) -> None:
        self.engine.abort_request(self.live)
        self.live = []
        while self.engine.has_unfinished_requests():
            self.engine.step()


def prefill(side: Side, prompt: list[int]) -> Iterator[float]:
    start_s = time.process_time()
    side.add(prompt, 1)
    while not side.step():
        pass
    yield time.process_time() - start_s


def decode(side: Side, prompts: list[list[int]], steps: int) -> Iterator[float]:
    for prompt in prompts:
        side.add(prompt, steps + len(prompts) + 20)
    # Until all are past their prompts: two full steps in a row.
    full = 0
    while full < 2:
        full = full + 1 if side.step() == len(prompts) else 0
    for _ in range(steps):
        start_s = time.process_time()
        given = side.step()
        yield time.process_time() - start_s
        assert given == len(prompts), f"{given} tokens of {len(prompts)}"


def answer(side: Side, command: dict[str, Any], numbers: random.Random) -> list[float]:
    def prompt(tokens: int) -> list[int]:
        return [numbers.randrange(3, VOCABULARY) for _ in range(tokens)]

    if command["work"] == "prefill":
        seconds = list(prefill(side, prompt(command["tokens"])))
    else:
        prompts = [prompt(command["context"]) for _ in range(command["batch"])]
        seconds = list(decode(side, prompts, command["steps"]))
    side.clear()
    return seconds


def main() -> None:
    kind, model = sys.argv[1:]
    # Whatever the engines print goes to stderr; answers have a pipe of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    side: Side = {"ours": Ours, "vllm": Vllm}[kind](model)
    numbers = random.Random(1)
    answers.write(json.dumps({"ready": kind}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps({"cpu_s": answer(side, json.loads(line), numbers)}) + "\n")


if __name__ == "__main__":
    main()
