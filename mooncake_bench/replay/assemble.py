"""What do the engines' records come to as frames of the schema, and can they be believed?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from mooncake_bench.records import CHUNKS, REQUESTS, SPANS, conform
from mooncake_bench.replay.client import ClientStats
from mooncake_bench.replay.options import ReplayOptions
from mooncake_bench.replay.recorder import FAILED, ROW, STATUSES, Batch
from mooncake_bench.replay.schedule import Ints, Plan

WORKER_LOST = "worker lost"
_INTEGERS = ("http_status", "reused_tokens", "fetched_tokens", "attempts")
_UNCHANGED = (
    *("sent_s", "placed_s", "fetched_s", "prefill_start_s", "prefill_end_s", "transferred_s"),
    *("first_token_s", "decode_start_s", "prefill_busy_s", "predicted_ttft_s", "predicted_tbt_s"),
    *("retry_after_s", "transfer_start_s", "prefix_replicas"),
    *_INTEGERS,
)


def build_frames(
    plan: Plan, batches: Sequence[Batch], lost: Ints | None = None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The requests and spans frames of records.py, from the records of all engines.

    `plan` is that of the whole trace. Rows without a record were not due yet when somebody ended
    the run and are left out; those at the positions `lost`, a dead worker's, count as failed.
    """
    table = np.concatenate([batch.table() for batch in batches] or [np.empty(0, dtype=ROW)])
    texts = pl.DataFrame(
        {
            "reason": [text or None for batch in batches for text in batch.reasons],
            "prefill": [text for batch in batches for text in batch.prefills],
            "decode": [text for batch in batches for text in batch.decodes],
        },
        schema={"reason": pl.String, "prefill": pl.String, "decode": pl.String},
    )
    measured = _requests(plan, table, texts)
    if lost is not None:
        measured = pl.concat([measured, _lost(plan, measured, lost)], how="diagonal")
    measured = measured.select(name for name in REQUESTS if name in measured.columns)
    return conform(measured, "requests").sort("request"), _spans(table, batches)


def _requests(plan: Plan, table: npt.NDArray[Any], texts: pl.DataFrame) -> pl.DataFrame:
    where = np.searchsorted(plan.request, table["request"].astype(np.int64))
    arrival_s = table["arrival_s"]
    usage, received = table["usage_tokens"], table["received_tokens"]
    prompt = np.where(np.isnan(table["prompt_tokens"]), 0.0, table["prompt_tokens"])
    columns = {name: table[name] for name in _UNCHANGED} | {
        "request": table["request"],
        "arrival_s": arrival_s,
        # A clock read twice can differ in its last bit: never before the arrival.
        "finished_s": np.maximum(table["finished_s"], arrival_s),
        "input_tokens": np.where(prompt > 0, prompt, plan.input_tokens[where]),
        "output_tokens": np.where(np.isnan(usage), received, usage),
        "output_tokens_asked": plan.output_tokens[where],
        "status": np.array(STATUSES)[table["status"].astype(np.int64)],
    }
    if plan.classes is not None:
        columns["class"] = plan.classes.gather(where)
    frame = pl.DataFrame(columns).with_columns(texts)
    frame = frame.with_columns(pl.col(pl.Float64).fill_nan(None))
    return frame.cast({name: REQUESTS[name] for name in frame.columns})


def _lost(plan: Plan, measured: pl.DataFrame, lost: Ints) -> pl.DataFrame:
    rows = lost[~np.isin(plan.request[lost], measured["request"].to_numpy())]
    classes = {"class": plan.classes.gather(rows)} if plan.classes is not None else {}
    return pl.DataFrame(
        classes
        | {
            "request": plan.request[rows],
            "arrival_s": plan.due_s[rows],
            "finished_s": plan.due_s[rows],
            "input_tokens": plan.input_tokens[rows],
            "output_tokens": np.zeros(len(rows), dtype=np.int64),
            "output_tokens_asked": plan.output_tokens[rows],
        }
    ).with_columns(status=pl.lit(STATUSES[FAILED]), reason=pl.lit(WORKER_LOST))


def _spans(table: npt.NDArray[Any], batches: Sequence[Batch]) -> pl.DataFrame:
    """One row a token after the first: its gap from the token before."""
    times = np.concatenate(
        [np.frombuffer(batch.times, dtype=np.float64) for batch in batches] or [np.empty(0)]
    )
    counts = table["received_tokens"].astype(np.int64)
    owner = np.repeat(table["request"].astype(np.int64), counts)
    if len(times) < 2:
        return pl.DataFrame(schema=SPANS)
    later = owner[1:] == owner[:-1]
    order = np.argsort(owner[1:][later], kind="stable")
    start_s, end_s = times[:-1][later][order], times[1:][later][order]
    steps = np.ones(len(start_s), dtype=np.int64)
    return pl.DataFrame(
        {
            "request": owner[1:][later][order],
            "start_s": start_s,
            "steps": steps,
            "first_gap_s": end_s - start_s,
            "growth_s": np.zeros(len(start_s)),
        }
    )


def build_chunks(batches: Sequence[Batch]) -> pl.DataFrame:
    """The chunks of prefills that servers have told, as rows of records.CHUNKS."""
    rows = [np.frombuffer(batch.pieces, dtype=np.float64).reshape(-1, 3) for batch in batches]
    pieces = np.concatenate(rows or [np.empty((0, 3))])
    tables = [batch.table() for batch in batches]
    owners = [np.repeat(one["request"], one["chunks"].astype(np.int64)) for one in tables]
    columns = {
        "request": np.concatenate(owners or [np.empty(0)]),
        **{name: pieces[:, at] for at, name in enumerate(("start_s", "end_s", "tokens"))},
    }
    frame = pl.DataFrame(columns).cast(pl.Schema(CHUNKS))
    return frame.sort("request", "start_s", maintain_order=True)


def judge(
    options: ReplayOptions,
    plan: Plan,
    requests: pl.DataFrame,
    engines: Sequence[ClientStats],
    stopped: str = "",
) -> tuple[dict[str, Any], list[str], list[str]]:
    """What the client says of itself, why the run is invalid, and what to know otherwise.

    Returns (client, invalid_reasons, warnings); each reason is a sentence with its remedy. Where a
    monitor `stopped` the run, that comes first.
    """
    lag_s = (requests["sent_s"] - requests["arrival_s"]).drop_nulls()
    client: dict[str, Any] = {
        "lag_s": {
            "p50": lag_s.quantile(0.5, "linear"),
            "p99": lag_s.quantile(0.99, "linear"),
            "max": lag_s.max(),
        },
        "lag_bound_s": options.max_lag,
        "cpu": max((one.cpu_share for one in engines), default=0.0),
        "cpu_bound": options.max_cpu,
        "loop_lag_s": {
            "p99": max((one.loop_lag_p99_s for one in engines), default=0.0),
            "max": max((one.loop_lag_max_s for one in engines), default=0.0),
        },
        "loop_lag_bound_s": options.max_stall,
        "connections_failed": _connect_failures(requests),
        "engines": len(engines),
        "connections": sum(one.connections for one in engines),
        "planned": len(plan),
        "not_sent": len(plan) - requests.height,
    }
    invalid = _invalid(client, requests, engines, stopped)
    return client, invalid, _warnings(plan, requests, engines)


CONNECT_FAILURES = ("connection refused", "connect timeout", "connect failed")


def _connect_failures(requests: pl.DataFrame) -> dict[str, int]:
    """Requests for which no connection could be opened, by reason."""
    reason = pl.col("reason")
    failed = requests.filter(
        pl.any_horizontal(reason.str.starts_with(start) for start in CONNECT_FAILURES)
    )
    counts = failed.group_by("reason").len().sort("reason")
    return {text: int(count) for text, count in counts.iter_rows()}


def _invalid(
    client: dict[str, Any],
    requests: pl.DataFrame,
    engines: Sequence[ClientStats],
    stopped: str,
) -> list[str]:
    reasons = []
    if stopped:
        reasons.append(
            f"The run was stopped early: {stopped}. Its numbers are of its first part only."
        )
    lag_s: float = client["lag_s"]["p99"] or 0.0
    if lag_s > client["lag_bound_s"]:
        reasons.append(
            f"The client was late: p99 of its lag is {lag_s * 1e3:.0f} ms, more than "
            f"{client['lag_bound_s'] * 1e3:.0f} ms; use more Locust workers or a lower --speed."
        )
    if client["cpu"] > client["cpu_bound"]:
        reasons.append(
            f"The client used {client['cpu']:.0%} of a core, more than {client['cpu_bound']:.0%}: "
            "its own waiting may be in the times; use more Locust workers or a lower --speed."
        )
    stall_s: float = client["loop_lag_s"]["p99"]
    if stall_s > client["loop_lag_bound_s"]:
        reasons.append(
            f"The client stood still: its event loop was late by {stall_s * 1e3:.0f} ms at p99, "
            f"more than {client['loop_lag_bound_s'] * 1e3:.0f} ms; give it a core of its own, or "
            "use more Locust workers."
        )
    # Refused or unanswered is the server's doing; no file or port left is ours.
    own = {why: n for why, n in client["connections_failed"].items() if why.startswith("connect f")}
    if own:
        why = max(own, key=lambda reason: own[reason])
        reasons.append(
            f"The client could not open connections for {sum(own.values())} requests ({why}); "
            "raise its limits (ulimit -n, free ports) or use more Locust workers."
        )
    if not stopped and any(one.interrupted_at_s is not None for one in engines):
        reasons.append(
            f"The run was interrupted with {client['not_sent']} of {client['planned']} requests "
            "not sent; let it end, or choose a shorter --window."
        )
    lost = requests.filter(pl.col("reason") == WORKER_LOST).height
    if lost:
        reasons.append(
            f"A Locust worker was lost with {lost} of {client['planned']} requests; see its log "
            "and run again."
        )
    return reasons


def _asked_tokens(plan: Plan, requests: pl.DataFrame) -> int:
    where = np.searchsorted(plan.request, requests["request"].to_numpy())
    return int(plan.input_tokens[where].sum())


def _warnings(plan: Plan, requests: pl.DataFrame, engines: Sequence[ClientStats]) -> list[str]:
    warnings = []
    gone = sorted({one.gone for one in engines if one.gone})
    if gone:
        count = requests.filter(pl.col("reason").str.starts_with("endpoint gone")).height
        warnings.append(
            f"The endpoint went away ({gone[0]}); {count} requests that were never sent count as "
            "failed."
        )
    finished = requests.filter(pl.col("status") == "finished")
    prompt_tokens, asked_tokens = int(finished["input_tokens"].sum()), _asked_tokens(plan, finished)
    # Lengths of literal prompts are estimates: there the server's count is the only one.
    is_estimate = plan.prompts is not None
    if not is_estimate and abs(prompt_tokens - asked_tokens) > 0.01 * asked_tokens:
        warnings.append(
            f"The server counted {prompt_tokens} prompt tokens where the trace has {asked_tokens}; "
            "input and reused tokens are given by its count."
        )
    other = finished.filter(pl.col("output_tokens") != pl.col("output_tokens_asked")).height
    if other:
        warnings.append(
            f"{other} of {finished.height} finished requests have another number of output tokens "
            "than was asked for; does the server know ignore_eos?"
        )
    return warnings
