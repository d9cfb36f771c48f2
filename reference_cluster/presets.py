"""Which systems does the Mooncake FAST'25 paper compare? Overrides for `load_config`, by name."""

from __future__ import annotations

from typing import Any

# Profile of the papers' tests from end to end; what was calibrated on what stands in its file.
PROFILE = "a800-llama3-70b-e2e"

# vLLM v0.5.1, one instance a node behind a load balancer.
VLLM: dict[str, Any] = {
    "profile": PROFILE,
    "system": "colocated",
    "conductor.scheduling": "least-loaded",
}

PRESETS: dict[str, dict[str, Any]] = {
    "mooncake": {"profile": PROFILE, "conductor.scheduling": "kvcache-centric"},
    "vllm": VLLM,
    "vllm-prefix-caching": {**VLLM, "colocated.prefix_caching": True},
    # The paper does not give the token budget: fitted to Figure 1, together with chunked_step_s.
    "vllm-chunked": {
        **VLLM,
        "colocated.batching": "chunked",
        "colocated.step_tokens_max": 1650,
    },
}
