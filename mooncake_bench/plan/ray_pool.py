"""How do trials run on a Ray cluster? One remote function; Ray schedules, retries and ends it."""

from __future__ import annotations

from concurrent.futures import Future

from mooncake_bench.plan.candidate import Job
from mooncake_bench.plan.errors import PlanError
from mooncake_bench.plan.outcome import Outcome
from mooncake_bench.plan.pools import run

try:
    import ray
except ImportError:
    ray = None


class RayPool:
    """Trials as tasks of one CPU. The trace must have the same path on every node.

    `address` is as for `ray.init`: "local" starts a cluster on this machine, "auto" finds a running
    one. Raises PlanError where Ray or the cluster is not there.
    """

    def __init__(self, address: str, workers: int) -> None:
        if ray is None:
            raise PlanError('--ray needs Ray; install the extra: pip install "mooncake-bench[ray]"')
        own = {"num_cpus": workers} if address == "local" else {}
        try:
            ray.init(address, log_to_driver=False, logging_level="error", **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            first = str(error).strip().split("\n", 1)[0]
            raise PlanError(f"--ray {address}: {first}; give a running cluster") from None
        self.task = ray.remote(num_cpus=1)(run)

    def submit(self, job: Job) -> Future[Outcome]:
        future: Future[Outcome] = self.task.remote(job).future()
        return future

    def close(self) -> None:
        ray.shutdown()
