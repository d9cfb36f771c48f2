"""How loaded was each instance over time? Regular samples of all of them, as columns."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

SAMPLE_COLUMNS = (
    "time_s",
    "instance",
    "role",
    "load",
    "queue",
    "running",
    "context_tokens",
    "pool_used_blocks",
    "pool_capacity_blocks",
    "link_bytes_per_s",
    "evicted_blocks",
)


class Sampled(Protocol):
    """Whatever can describe itself as one row of SAMPLE_COLUMNS."""

    def sample(self, now_s: float) -> tuple[Any, ...]: ...


class Samples:
    """A bounded table: when it is full every second row of times is dropped and the pace halved."""

    def __init__(self, every_s: float, rows_max: int = 200_000) -> None:
        self.every_s = every_s
        self.rows_max = rows_max
        self.rows: list[tuple[Any, ...]] = []

    async def run(self, instances: list[Sampled]) -> None:
        """Sample for ever."""
        loop = asyncio.get_running_loop()
        while True:
            now_s = loop.time()
            self.rows.extend(instance.sample(now_s) for instance in instances)
            if len(self.rows) >= self.rows_max:
                self.thin(len(instances))
            await asyncio.sleep(self.every_s)

    def thin(self, instances: int) -> None:
        self.every_s *= 2
        self.rows = [
            row for position, row in enumerate(self.rows) if position // instances % 2 == 0
        ]
