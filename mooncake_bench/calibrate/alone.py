"""What does a torch engine cost by itself, in this process: without HTTP, hand-over, neighbours?"""

from __future__ import annotations

import time
from pathlib import Path

from mooncake_bench.calibrate.fit import DecodePoint, Points, PrefillPoint
from mooncake_bench.calibrate.probe import ProbePlan
from reference_cluster.config import load_config
from reference_cluster.errors import ConfigError


def alone(path: Path, plan: ProbePlan) -> Points:
    """Run the engine of a cluster's configuration; raises ConfigError."""
    config = load_config(path, {})
    if config.engine.kind != "torch":
        raise ConfigError(f'{path}: engine.kind is "{config.engine.kind}"; only torch runs here')
    if config.engine.tensor_parallel != 1:
        raise ConfigError(
            f"{path}: engine.tensor_parallel is not 1; probe the live cluster instead"
        )
    try:
        from reference_cluster.engines.torch.engine import replica_of
        from reference_cluster.engines.torch.timed import TimedReplica
    except ImportError as error:
        raise ConfigError(f"{path}: no {error.name}; pip install 'mooncake-bench[torch]'") from None
    settings = replica_of(config.engine)
    chunk_tokens = config.prefill.chunk_tokens
    replica = TimedReplica(
        settings, config.block_tokens, chunk_tokens, plan.seed, time.perf_counter
    )
    replica.prefill(plan.lengths[0], 0.0, 1)  # Whatever the first prompt wakes.
    asked = [(n, 0.0) for n in plan.lengths] + [(max(plan.lengths), hit) for hit in plan.hits]
    prefills = [PrefillPoint(n, *replica.prefill(n, hit, plan.repeats)) for n, hit in asked]
    decodes = [
        DecodePoint(batch, *replica.decode(batch, context, plan.steps, plan.repeats))
        for batch in plan.batches
        for context in plan.contexts
    ]
    return Points(prefills, decodes)
