"""Where do trials run? In processes of this machine, or on a Ray cluster: both give futures."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import Protocol

from mooncake_bench.plan.candidate import Job
from mooncake_bench.plan.outcome import Outcome


class Pool(Protocol):
    """Runs trials, several at a time."""

    def submit(self, job: Job) -> Future[Outcome]: ...

    def close(self) -> None: ...


class LocalPool:
    """Worker processes, used again and again: each imports and reads everything once."""

    def __init__(self, workers: int) -> None:
        # Spawned, because a fork of a process with polars' threads may hang.
        self.executor = ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=follow_the_parent
        )

    def submit(self, job: Job) -> Future[Outcome]:
        return self.executor.submit(run, job)

    def close(self) -> None:
        self.executor.shutdown(wait=True, cancel_futures=True)


def run(job: Job) -> Outcome:
    from mooncake_bench.plan.trial import run_trial  # The parent need not load the simulator.

    return run_trial(job)


def follow_the_parent() -> None:
    """Ctrl-C is the parent's to handle; a parent that was killed takes its workers with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, name="follow the parent", daemon=True).start()
