"""How is a model replica put together? Settings in, a runner with weights and pages out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from reference_cluster.engines.torch.architecture import PRESETS, LlamaConfig, read_config
from reference_cluster.engines.torch.llama import Llama, alone
from reference_cluster.engines.torch.pages import PagedCache
from reference_cluster.engines.torch.runner import Runner
from reference_cluster.engines.torch.weights import (
    WHOLE,
    Share,
    Weights,
    choose_device,
    choose_dtype,
    load_weights,
    random_weights,
)
from reference_cluster.errors import ConfigError


class ReplicaConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model and where it runs. `model` is a directory, or a preset filled from `seed`."""

    model: str = "tiny"
    seed: int = 0
    dtype: str | None = None  # None: what the model's config says.
    device: str = "cpu"
    kv_tokens: int = 65536  # The KV cache of all layers holds so many.
    page_tokens: int = 128
    tensor_parallel: int = 1
    native: bool = True  # Decode attention in C, where there is a compiler.

    @property
    def directory(self) -> Path | None:
        return None if self.model in PRESETS else Path(self.model)


def read_architecture(config: ReplicaConfig) -> LlamaConfig:
    """Of the preset or the directory; raises ConfigError."""
    if config.directory is None:
        return PRESETS[config.model]
    if not config.directory.is_dir():
        raise ConfigError(
            f"model {config.model!r} is neither a directory nor one of {', '.join(PRESETS)}"
        )
    return read_config(config.directory)


def build_runner(
    config: ReplicaConfig, share: Share = WHOLE, all_reduce: Callable[[Tensor], Tensor] = alone
) -> Runner:
    """One rank's part of a replica; raises ConfigError in one line."""
    architecture = read_architecture(config)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype or architecture.dtype, device)
    weights = get_weights(config, architecture, dtype, device, share)
    cache = PagedCache(
        architecture,
        config.kv_tokens // config.page_tokens,
        config.page_tokens,
        dtype,
        device,
        share.ranks,
    )
    return Runner(Llama(architecture, weights, cache, share.ranks, all_reduce), config.native)


def get_weights(
    config: ReplicaConfig,
    architecture: LlamaConfig,
    dtype: torch.dtype,
    device: torch.device,
    share: Share,
) -> Weights:
    if config.directory is None:
        return random_weights(architecture, config.seed, dtype, device, share)
    return load_weights(config.directory, architecture, dtype, device, share)
