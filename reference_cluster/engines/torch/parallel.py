"""How do several ranks compute one model? Each runs the same steps on its share of the heads.

All ranks are given the same requests in the same order and draw the same tokens, since sums over
ranks are the same on all of them: nothing but partial results travels.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec
import torch.distributed
from torch import Tensor

from reference_cluster.engines.torch.replica import ReplicaConfig, build_runner
from reference_cluster.engines.torch.runner import Runner
from reference_cluster.engines.torch.weights import Share
from reference_cluster.errors import ConfigError

TIMEOUT = timedelta(seconds=120)


def join(config: ReplicaConfig, rank: int, address: str) -> Runner:
    """Rank `rank` of a replica; `address` is tcp://127.0.0.1:port or file:///path, all the same.

    Returns when all ranks are there. gloo on CPUs, nccl on CUDA devices.
    """
    if not 0 <= rank < config.tensor_parallel:
        raise ConfigError(f"rank {rank} of tensor_parallel {config.tensor_parallel}; start fewer")
    if config.device.startswith("cuda"):  # A device each, from the one that is named on.
        first = int(config.device.partition(":")[2] or 0)
        config = msgspec.structs.replace(config, device=f"cuda:{first + rank}")
    distributed: Any = torch.distributed
    distributed.init_process_group(
        "gloo" if config.device == "cpu" else "nccl",
        init_method=address,
        world_size=config.tensor_parallel,
        rank=rank,
        timeout=TIMEOUT,
    )

    def all_reduce(x: Tensor) -> Tensor:
        distributed.all_reduce(x)
        return x

    return build_runner(config, Share(rank, config.tensor_parallel), all_reduce)


def all_wait() -> None:
    """Return when all ranks have called it."""
    distributed: Any = torch.distributed
    distributed.barrier()


def leave() -> None:
    torch.distributed.destroy_process_group()
