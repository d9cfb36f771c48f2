"""What breaks first? Named from what the requests that missed had spent their time on."""

from __future__ import annotations

from mooncake_bench.plan.outcome import Outcome

WORDS = {
    "prefill-compute": "prefill compute: prompts queue for their prefill",
    "long-prompts": "long prompts: one prefill alone takes longer than the TTFT bound",
    "links": "links: prompts wait for their KVCache to be transferred or fetched",
    "decode-step": "decode speed: steps of the batches are too slow",
    "decode-memory": "decode memory: requests wait for room in device memory",
    "device-memory": "device memory: prompts do not fit into one node",
    "admission": "admission: requests are refused before they could be late",
    "colocated-prefill": "interference: prefills hold up the decodes of their node",
    "none": "nothing: no request misses",
}


def bottleneck(outcome: Outcome, system: str) -> str:
    """A key of WORDS for a whole run."""
    misses = {name: count for name, count in outcome.misses.items() if count}
    if not misses:
        return "none"
    refused = outcome.rejected_by_reason
    if misses.get("rejected", 0) >= sum(misses.values()) / 2:
        main = max(refused, key=lambda reason: (refused[reason], reason))
        by_reason = {"ttft": "prefill-compute", "too-large": "device-memory"}
        by_reason |= {"tbt": "decode-step", "tbt-at-decode": "decode-step"}
        return by_reason.get(main, "decode-memory" if main == "capacity" else "admission")
    stages = {name: value or 0.0 for name, value in outcome.stages_missed.items()}
    late = misses.get("late_first_token", 0) + misses.get("both", 0)
    if late >= misses.get("slow_tokens", 0):
        waited = {name: stages[name] for name in ("queue", "reuse_load", "prefill", "transfer")}
        worst = max(waited, key=lambda name: waited[name])
        by_stage = {"queue": "prefill-compute", "prefill": "long-prompts"}
        return by_stage.get(worst, "links")
    if system == "colocated":
        return "colocated-prefill"
    waiting = stages.get("decode_queue", 0.0)
    return "decode-memory" if waiting > stages.get("decode", 0.0) / 4 else "decode-step"
