"""What does each kind of server take, and what must it be started with to tell all that it knows?

Facts of vLLM 0.32, SGLang 0.5, Dynamo 1.6 and TGI 3.3, by their sources and documentation.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl


@dataclass(frozen=True, slots=True)
class Server:
    """A kind of server behind the OpenAI API; `--server` names it."""

    title: str
    metrics: str
    """How the names of its own metrics begin."""
    metrics_remedy: str
    cached_remedy: str
    """What makes it tell in `usage` how much of a prompt it had cached."""
    takes_token_ids: bool = True
    knows_ignore_eos: bool = True


SERVERS = {
    "vllm": Server(
        title="vLLM",
        metrics="vllm:",
        metrics_remedy="start it without --disable-log-stats",
        cached_remedy="start it with --enable-prompt-tokens-details",
    ),
    "sglang": Server(
        title="SGLang",
        metrics="sglang:",
        metrics_remedy="start it with --enable-metrics",
        cached_remedy="start it with --enable-cache-report",
    ),
    "dynamo": Server(
        title="Dynamo",
        metrics="dynamo_frontend_",
        metrics_remedy="give the frontend's URL, not a worker's",
        cached_remedy="give it a backend that reports them, like its vLLM one",
    ),
    "tgi": Server(
        title="TGI",
        metrics="tgi_",
        metrics_remedy="give the router's URL, not a shard's",
        cached_remedy="it has no such field: leave reuse to its own logs",
        takes_token_ids=False,
        knows_ignore_eos=False,
    ),
}


def warnings_about(
    server: Server, requests: pl.DataFrame, metrics: pl.DataFrame | None
) -> list[str]:
    """What the server could have told and did not, each with its remedy.

    `requests` and `metrics` as in records.py; `metrics` None where /metrics was not to be read.
    """
    warnings = []
    finished = requests.filter(pl.col("status") == "finished")
    if finished.height and finished["reused_tokens"].is_null().all():
        warnings.append(
            f"{server.title} did not say how many tokens it had cached; {server.cached_remedy}."
        )
    if metrics is not None and not metrics["name"].str.starts_with(server.metrics).any():
        warnings.append(
            f"/metrics has no {server.metrics}* of {server.title}; {server.metrics_remedy}."
        )
    if finished.height and not server.knows_ignore_eos:
        warnings.append(
            f"{server.title} has no ignore_eos: answers may be shorter than the trace's."
        )
    return warnings
