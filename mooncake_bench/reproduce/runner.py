"""How is everything run once? Worker processes, and small files that outlive a Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec

from mooncake_bench.reproduce.errors import ReproduceError
from mooncake_bench.reproduce.plan import Job

Result = dict[str, Any]  # {"cpu_s": ..., "values": ..., "plan": ...}


def load_results(directory: Path, jobs: Iterable[Job]) -> dict[str, Result]:
    """The results that are there already, by digest; a broken file counts as not there."""
    found = {}
    for job in jobs:
        try:
            text = path_of(directory, job).read_text(encoding="utf-8")
            result = json.loads(text)
        except (OSError, ValueError):
            continue
        if isinstance(result, dict) and {"cpu_s", "values"} <= result.keys():
            found[job.digest] = result
    return found


def run_all(
    jobs: Sequence[Job], directory: Path, workers: int, on_done: Callable[[Job, Result], None]
) -> None:
    """Run every job and keep its result in `directory`; `on_done` is called as they finish.

    On KeyboardInterrupt what has begun is finished and kept, and the interrupt goes on.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReproduceError(
            f"{directory}: cannot be made ({error.strerror}); choose --out"
        ) from None
    # Workers are used again and again: each imports everything once. Spawned, because a fork of
    # a process with polars' threads may hang.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=leave_interrupts_alone)
    try:
        for job, result in finished(pool, jobs, directory):
            on_done(job, result)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def finished(
    pool: ProcessPoolExecutor, jobs: Sequence[Job], directory: Path
) -> Iterator[tuple[Job, Result]]:
    by_future: dict[Future[Result], Job] = {
        pool.submit(run_and_keep, job, directory): job for job in jobs
    }
    for future in as_completed(by_future):
        yield by_future[future], future.result()


def run_and_keep(job: Job, directory: Path) -> Result:
    """In a worker: one run, its result written whole or not at all."""
    from mooncake_bench.reproduce.work import do  # The parent need not load the simulator.

    result: Result = {"plan": msgspec.to_builtins(job.plan), "source": job.source, **do(job)}
    path = path_of(directory, job)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(result), encoding="utf-8")
    unfinished.replace(path)
    return result


def leave_interrupts_alone() -> None:
    """Ctrl-C reaches the whole process group: the parent decides, workers finish what they do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def path_of(directory: Path, job: Job) -> Path:
    return directory / f"{job.digest}.json"
