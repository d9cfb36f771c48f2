"""Who runs the trials? Each is run once, by any pool, and kept in a small file of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import msgspec

from mooncake_bench.digest import digest_of_source
from mooncake_bench.plan.candidate import Job, Load, Scene, Trial
from mooncake_bench.plan.errors import PlanError
from mooncake_bench.plan.outcome import Outcome
from mooncake_bench.plan.pools import Pool

# Whatever can change a trial's outcome: what other code has left does not count.
CODE = (
    "reference_cluster",
    "workloads",
    "mooncake_bench/metrics.py",
    "mooncake_bench/simulation.py",
    "mooncake_bench/plan/candidate.py",
    "mooncake_bench/plan/outcome.py",
    "mooncake_bench/plan/trial.py",
)


class Kept(msgspec.Struct):
    """A file of `trials/`: what was run, and what came out."""

    trial: Trial
    outcome: Outcome


class Counts(msgspec.Struct):
    """How many trials were run now, of them stopped early, and found from before."""

    run: int = 0
    stopped: int = 0
    reused: int = 0
    cpu_s: float = 0.0


class Lab:
    """Answers trials, from its memory, from files of an earlier call, or by running them."""

    def __init__(
        self,
        scene: Scene,
        pool: Pool,
        directory: Path,
        on_done: Callable[[Trial, Outcome, bool], None],
    ) -> None:
        self.scene = scene
        self.pool = pool
        self.directory = directory
        self.on_done = on_done
        self.counts = Counts()
        self.under_way: dict[tuple[Trial, bool], asyncio.Task[Outcome]] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlanError(f"{directory}: {error.strerror}; choose another --out") from None

    async def outcome(self, trial: Trial, is_whole: bool = True) -> Outcome:
        """What comes of it; unless `is_whole`, stopped as soon as the target is out of reach."""
        whole = self.under_way.get((trial, True))
        if whole is not None:
            return await asyncio.shield(whole)
        key = (trial, is_whole)
        if key not in self.under_way:
            work = self.answered(trial, is_whole)
            self.under_way[key] = asyncio.create_task(work, name=trial.candidate.title)
        return await asyncio.shield(self.under_way[key])

    async def outcomes(self, trials: Sequence[Trial], is_whole: bool = True) -> list[Outcome]:
        """Of several at once, in their order."""
        return list(await asyncio.gather(*(self.outcome(one, is_whole) for one in trials)))

    async def answered(self, trial: Trial, is_whole: bool) -> Outcome:
        partly = self.under_way.get((trial, False))
        if is_whole and partly is not None:
            found = await asyncio.shield(partly)
            if not found.is_stopped:
                return found
        job = Job(self.scene, trial, is_whole)
        path = self.directory / f"{job.digest(code_digest())}.json"
        kept = read(path)
        if kept is not None and not (is_whole and kept.is_stopped):
            self.counts.reused += 1
            self.on_done(trial, kept, False)
            return kept
        outcome = await asyncio.wrap_future(self.pool.submit(job))
        write(path, Kept(trial, outcome))
        self.counts.run += 1
        self.counts.stopped += outcome.is_stopped
        self.counts.cpu_s += outcome.cpu_s
        self.on_done(trial, outcome, True)
        return outcome


def read(path: Path) -> Outcome | None:
    """An earlier call's outcome; a broken file counts as not there."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Kept).outcome
    except (OSError, msgspec.DecodeError):
        return None


def write(path: Path, kept: Kept) -> None:
    """Whole or not at all, whenever the plan is killed. Raises PlanError."""
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        partial.write_bytes(msgspec.json.encode(kept))
        partial.replace(path)
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}; choose another --out") from None


@cache
def code_digest() -> str:
    """One digest of all source and profiles that a trial depends on."""
    return digest_of_source(CODE)


def at(load: Load, speed: float) -> Load:
    """The load, its people so many times as fast as before."""
    return msgspec.structs.replace(load, speed=load.speed * speed)
