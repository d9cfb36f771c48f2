"""What does this endpoint cost, asked from outside?

A probe is seen from outside, so that whatever stands between client and engine (HTTP, hand-over)
is part of the base times, as it is of every request.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass

import httpx
import msgspec

from mooncake_bench.calibrate.fit import DecodePoint, Points, PrefillPoint
from mooncake_bench.replay.errors import ReplayError

FIRST_TOKEN, PAST_TOKEN = 1000, 31_000  # Plain ids of any usual vocabulary.


class ProbePlan(msgspec.Struct, frozen=True):
    """What is asked of the endpoint. Tokens; each point `repeats` times, its median counts."""

    lengths: tuple[int, ...] = (64, 256, 1024, 2048, 4096)
    hits: tuple[float, ...] = (0.5, 0.9)  # Shares of the longest prompt that it has seen before.
    batches: tuple[int, ...] = (1, 2, 4, 8)
    contexts: tuple[int, ...] = (64, 1024)
    steps: int = 32
    repeats: int = 5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Heard:
    """One answer: when each of its tokens came, since it was asked, and what was cached of it."""

    token_s: list[float]
    cached_tokens: int


async def probe(url: str, plan: ProbePlan, model: str | None = None) -> Points:
    """Ask for all points, one after another; nobody else may use the endpoint meanwhile."""
    numbers = random.Random(plan.seed)
    async with httpx.AsyncClient(base_url=url, timeout=300.0) as client:
        prober = Prober(client, model, numbers)
        await prober.ask(prober.prompt(plan.lengths[0]), 2)  # Whatever the first request wakes.
        prefills = [await prober.prefill(n, 0.0, plan.repeats) for n in plan.lengths]
        longest = max(plan.lengths)
        prefills += [await prober.prefill(longest, hit, plan.repeats) for hit in plan.hits]
        decodes = [
            await prober.decode(batch, context, plan.steps, plan.repeats)
            for batch in plan.batches
            for context in plan.contexts
        ]
    return Points(prefills, decodes)


class Prober:
    """Asks one endpoint."""

    def __init__(
        self, client: httpx.AsyncClient, model: str | None, numbers: random.Random
    ) -> None:
        self.client = client
        self.model = model
        self.numbers = numbers

    def prompt(self, tokens: int) -> list[int]:
        return [self.numbers.randrange(FIRST_TOKEN, PAST_TOKEN) for _ in range(tokens)]

    async def prefill(self, tokens: int, hit: float, repeats: int) -> PrefillPoint:
        """Median time to first token of fresh prompts, or of such whose beginning is known."""
        seconds, cached = [], []
        for _ in range(repeats):
            prompt = self.prompt(tokens)
            if hit:
                await self.ask(prompt, 2)
                known = int(tokens * hit)
                prompt = [*prompt[:known], *self.prompt(tokens - known)]
            heard = await self.ask(prompt, 2)
            seconds.append(heard.token_s[0])
            cached.append(heard.cached_tokens)
        return PrefillPoint(tokens, statistics.median_low(cached), statistics.median(seconds))

    async def decode(self, batch: int, context: int, steps: int, repeats: int) -> DecodePoint:
        """Median step while all of a batch decode."""
        seconds = []
        for _ in range(repeats):
            # Those that come first go on until the last has made its steps.
            prompts = [self.prompt(context) for _ in range(batch)]
            asked_s = time.perf_counter()
            answers = await asyncio.gather(
                *(self.ask(prompt, steps + 4 * batch, asked_s) for prompt in prompts)
            )
            begin_s = max(one.token_s[0] for one in answers)
            end_s = min(one.token_s[-1] for one in answers)
            gaps = [
                after - before
                for one in answers
                for before, after in zip(one.token_s, one.token_s[1:], strict=False)
                if before >= begin_s and after <= end_s
            ]
            if gaps:
                seconds.append(statistics.fmean(gaps))
        if not seconds:
            raise ReplayError(f"{batch} requests never decoded together; probe with more steps")
        middle = context + (steps + 4 * batch) / 2
        return DecodePoint(batch, batch * middle, statistics.median(seconds))

    async def ask(self, prompt: list[int], tokens: int, asked_s: float | None = None) -> Heard:
        body = {
            "model": self.model or "default",
            "prompt": prompt,
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start_s = time.perf_counter() if asked_s is None else asked_s
        came: list[float] = []
        cached = 0
        try:
            async with self.client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")[:200]
                    raise ReplayError(f"{self.client.base_url}: {response.status_code} {text}")
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        event = msgspec.json.decode(line[6:])
                        if event.get("choices"):
                            came.append(time.perf_counter() - start_s)
                        elif usage := event.get("usage"):
                            details = usage.get("prompt_tokens_details") or {}
                            cached = details.get("cached_tokens") or 0
        except httpx.HTTPError as error:
            raise ReplayError(f"{self.client.base_url}: {error!r}; is it running?") from None
        if not came:
            raise ReplayError(f"{self.client.base_url}: an answer without tokens; see its log")
        return Heard(came, cached)
