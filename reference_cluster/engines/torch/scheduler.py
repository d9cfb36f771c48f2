"""Who takes part in the next step? Continuous batching with chunked prefill, in three verbs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from reference_cluster.engines.torch.blocks import Moves
from reference_cluster.engines.torch.runner import Runner, Tokens, TooLongError, Work
from reference_cluster.engines.torch.sampling import has_stopped
from reference_cluster.engines.torch.tokenizer import Tokenizer
from reference_cluster.request import Sampling

Finish = Literal["length", "stop"]


@dataclass(slots=True, eq=False)
class Job:
    """A request from its arrival to its last token."""

    id: int
    tokens: Tokens
    finish: Finish | None = None
    preemptions: int = 0


@dataclass(slots=True)
class Scheduler:
    """One model replica alone: schedule, run, postprocess, until nothing is left.

    `step_tokens_max` is the budget of a step: decodes first, then chunks of prompts in the order
    of arrival. None computes every prompt in one chunk. Where pages run short the sequence that
    came last gives its pages back and is computed anew later: preemption by recompute.
    """

    runner: Runner
    step_tokens_max: int | None = 2048
    batch_max: int = 256
    tokenizer: Tokenizer | None = None
    waiting: deque[Job] = field(default_factory=deque)
    running: list[Job] = field(default_factory=list)
    preemptions: int = 0

    def add(
        self, id: int, prompt: Sequence[int], sampling: Sampling, moves: Moves | None = None
    ) -> Job:
        """Queue a prompt; raises TooLongError where it can never fit."""
        self.check_length(len(prompt), sampling.max_tokens)
        tokens = Tokens(list(prompt), len(prompt), sampling, moves)
        job = Job(id, tokens)
        self.waiting.append(job)
        return job

    def check_length(self, prompt_tokens: int, output_tokens: int) -> None:
        most = self.runner.model.config.context_tokens_max
        cache = self.runner.cache
        if not prompt_tokens:
            raise TooLongError("the prompt is empty; give at least one token")
        if prompt_tokens + output_tokens > most:
            raise TooLongError(
                f"{prompt_tokens} prompt and {output_tokens} output tokens exceed the model's "
                f"context of {most}; ask for less"
            )
        if prompt_tokens + output_tokens > cache.pages * cache.page_tokens:
            raise TooLongError(
                f"{prompt_tokens} prompt and {output_tokens} output tokens exceed the KV cache of "
                f"{cache.pages * cache.page_tokens} tokens; give it more pages"
            )

    def step(self) -> list[Job]:
        """One step; returns the jobs that have a new token, finished ones with `finish` set."""
        chunks, decodes = self.schedule()
        if not chunks and not decodes:
            return []
        return self.postprocess(self.runner.run(chunks, decodes))

    def schedule(self) -> tuple[list[Work], list[Tokens]]:
        """Decodes first; what is left of the budget goes to prompts."""
        decodes = self.make_room_for_decodes()
        budget = None if self.step_tokens_max is None else self.step_tokens_max - len(decodes)
        chunks = []
        for job in self.running:
            if is_prompt(job.tokens) and (count := self.chunk(job.tokens, budget)):
                chunks.append(Work(job.tokens, count))
                budget = None if budget is None else budget - count
        while self.waiting and len(self.running) < self.batch_max and budget != 0:
            tokens = self.waiting[0].tokens
            if not self.runner.cache.grow(tokens.pages, len(tokens.ids)):
                break
            self.reuse(tokens)
            self.running.append(self.waiting.popleft())
            count = self.chunk(tokens, budget)
            chunks.append(Work(tokens, count))
            budget = None if budget is None else budget - count
        return chunks, decodes

    @staticmethod
    def reuse(tokens: Tokens) -> None:
        """Begin after what the pool has; the first chunk loads it."""
        if tokens.moves is not None:
            tokens.computed = min(tokens.moves.reused_tokens, len(tokens.ids) - 1)

    @staticmethod
    def chunk(tokens: Tokens, budget: int | None) -> int:
        left = len(tokens.ids) - tokens.computed
        return left if budget is None else min(left, budget)

    def make_room_for_decodes(self) -> list[Tokens]:
        """One more token each, for as many as there are pages; the last come goes first."""
        decoding = [job for job in self.running if not is_prompt(job.tokens)]
        for job in decoding:
            while job in self.running and not self.runner.cache.grow(
                job.tokens.pages, len(job.tokens.ids)
            ):
                self.preempt(self.running[-1])
        return [job.tokens for job in decoding if job in self.running]

    def preempt(self, job: Job) -> None:
        self.running.remove(job)
        if not is_prompt(job.tokens):
            job.tokens.moves = None  # Its blocks are stored; whether they still are is not known.
        self.runner.forget(job.tokens)
        job.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(job)

    def postprocess(self, progressed: Sequence[Tokens]) -> list[Job]:
        """Whose new token was the last?"""
        ids = {id(tokens) for tokens in progressed}
        jobs = [job for job in self.running if id(job.tokens) in ids]
        for job in jobs:
            job.finish = self.finish_of(job)
            if job.finish is not None:
                self.running.remove(job)
                self.runner.forget(job.tokens)
        return jobs

    def finish_of(self, job: Job) -> Finish | None:
        tokens, sampling = job.tokens, job.tokens.sampling
        say = None if self.tokenizer is None else self.tokenizer.decode
        if has_stopped(tokens.produced, sampling, self.runner.model.config.end_tokens, say):
            return "stop"
        return "length" if len(tokens.produced) >= sampling.max_tokens else None

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more."""
        if job in self.waiting:
            self.waiting.remove(job)
        elif job in self.running:
            self.running.remove(job)
            self.runner.forget(job.tokens)

    def run_all(self) -> None:
        while self.waiting or self.running:
            self.step()

    def check_integrity(self) -> None:
        self.runner.cache.check_integrity([job.tokens.pages for job in self.running])


def is_prompt(tokens: Tokens) -> bool:
    """Is there prompt, or more than the newest token, to be computed?"""
    return tokens.computed < max(tokens.prompt_tokens, len(tokens.ids) - 1)
