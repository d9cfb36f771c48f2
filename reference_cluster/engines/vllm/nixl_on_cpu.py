"""What does vLLM's NixlConnector need on a CPU? This subclass, found by the name of its module.

What it transfers and how is vLLM's own. Left alone, two workers on a small host starve each other:
NIXL's thread asks for news without a pause, a core each, and the connector binds the thread that
makes it, and with that the engine, to the host's last core.
"""

from __future__ import annotations

import os
from typing import Any

from nixl import _api
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnector as StockConnector

PAUSE_US = 200  # Between two looks of NIXL's thread.
STOCK_CONFIG = _api.nixlBind.nixlAgentConfig


class PatientConfig(STOCK_CONFIG):  # type: ignore[misc,valid-type,unused-ignore]  # NIXL need not be there
    """Of an agent; nixl_agent itself sets a pause of 0, and cannot be told another."""

    @property
    def pthrDelay(self) -> int:  # noqa: N802  # NIXL's name
        pause_us: int = STOCK_CONFIG.pthrDelay.__get__(self)
        return pause_us

    @pthrDelay.setter
    def pthrDelay(self, pause_us: int) -> None:  # noqa: N802  # NIXL's name
        STOCK_CONFIG.pthrDelay.__set__(self, pause_us or PAUSE_US)


class NixlConnector(StockConnector):  # type: ignore[misc,unused-ignore]  # vLLM need not be there
    """The same, of which the rest of the process notices less."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        cpus = os.sched_getaffinity(0)
        _api.nixlBind.nixlAgentConfig = PatientConfig
        try:
            super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        finally:
            _api.nixlBind.nixlAgentConfig = STOCK_CONFIG
            os.sched_setaffinity(0, cpus)
