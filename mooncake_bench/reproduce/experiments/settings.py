"""What do the experiments have in common? The papers' workloads, systems and names."""

from __future__ import annotations

from typing import Any

from mooncake_bench.reproduce.plan import ClusterRun, Workload
from reference_cluster.presets import PRESETS, PROFILE

CONVERSATION = Workload(
    "conversation-like:duration_s=3537,rate_rps=3.4", "conversation_trace.jsonl", is_jittered=True
)
TOOLAGENT = Workload("toolagent-like", "toolagent_trace.jsonl", is_jittered=True)
# 3,993 requests, as in the FAST'25 paper's Table 2. The pace is not printed: this one keeps vLLM's
# engines as busy with prompts, about 36 %, as the conversation trace does.
SYNTHETIC = Workload(
    "leval-like:rate_rps=2.5,duration_s=1597.2,questions=4",
    "synthetic_trace.jsonl",
    is_jittered=True,
)
# The arXiv paper's hour of 23,000 requests; the generator makes 23,608, 8.6k tokens in, 182 out.
REAL = Workload("toolagent-like", "mooncake_trace.jsonl", is_jittered=True)

SYSTEMS = {
    "mooncake": "Mooncake",
    "vllm": "vLLM",
    "vllm-prefix-caching": "vLLM, prefix caching",
    "vllm-chunked": "vLLM, chunked prefill",
}
SYNTHETIC_STAND_IN = (
    "The generator stands in for the synthetic workload with 19.0k tokens in, 72 out and a "
    "ceiling of reuse near 75 %, where the paper's has 15.3k, 149 and 66 %; its pace is chosen."
)
STRATEGIES = {
    "kvcache-centric": "global cache-aware",
    "local-cache-aware": "local cache-aware",
    "least-loaded": "load balancing",
    "random": "random",
}
# The arXiv paper's model and nodes.
LLAMA2 = "a800-llama2-70b"


def kind(system: str) -> str:
    """Which family of colours a system has."""
    return "colocated" if "vllm" in system.lower() else "disaggregated"


def preset(system: str, workload: Workload, *, speed: float = 1.0, **overrides: Any) -> ClusterRun:
    """One of the four systems of FAST'25 Figure 1 on 16 nodes."""
    return ClusterRun(workload, {**PRESETS[system], **dotted(overrides)}, speed=speed)


def mooncake(workload: Workload, *, speed: float = 1.0, **overrides: Any) -> ClusterRun:
    return preset("mooncake", workload, speed=speed, **overrides)


def dotted(overrides: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments as config keys: conductor__admission is conductor.admission."""
    return {key.replace("__", "."): value for key, value in overrides.items()}


__all__ = [
    "CONVERSATION",
    "LLAMA2",
    "PROFILE",
    "REAL",
    "STRATEGIES",
    "SYNTHETIC",
    "SYNTHETIC_STAND_IN",
    "SYSTEMS",
    "TOOLAGENT",
    "dotted",
    "kind",
    "mooncake",
    "preset",
]
