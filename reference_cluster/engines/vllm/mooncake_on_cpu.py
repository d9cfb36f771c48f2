"""What does vLLM's MooncakeConnector need on a CPU? This module, that finds it by its name.

It asks torch for the number of its accelerator, which raises where there is none.
"""

from __future__ import annotations

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector import (
    MooncakeConnector,
)

__all__ = ["MooncakeConnector"]

if not torch.accelerator.is_available():
    torch.accelerator.current_device_index = lambda: 0
