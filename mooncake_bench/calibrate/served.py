"""What did requests cost a cluster that has served them, with all that happened beside?

Prompts and batches are those of a load, not a probe's, and so is what the processes of one host
take from each other. Needs a run with the server's stamps: of our own clusters.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import polars as pl

from mooncake_bench.calibrate.fit import DecodePoint, HandoverPoint, Points, PrefillPoint
from mooncake_bench.records import RecordsError, Run

Floats = npt.NDArray[np.float64]
STAMPS = (
    *("sent_s", "placed_s", "prefill_start_s", "prefill_busy_s", "first_token_s"),
    *("reused_tokens", "decode"),
)
CONTEXTS = 4  # Of the steps of one batch size, so many bins of equally many, by context.
STEPS_MIN = 8  # A median of fewer says little.


def served(run: Run) -> Points:
    """A point a prompt, and one a batch size and range of contexts; raises RecordsError."""
    finished = run.requests.filter(pl.col("status") == "finished")
    known = finished.drop_nulls(STAMPS)
    if known.is_empty():
        raise RecordsError(
            f"{run.directory}: no stamps of a live cluster; give a replay of `serve`, or probe it"
        )
    decodes = list(decode_points(known, run.spans))
    if not decodes:
        raise RecordsError(f"{run.directory}: too few decode steps; replay more, or longer answers")
    if run.info.system == "disaggregated":
        return Points(busy_points(known), decodes, handover_points(known))
    return Points(whole_points(known), decodes)


def whole_points(requests: pl.DataFrame) -> list[PrefillPoint]:
    """First token since sending, less what was waited for."""
    seconds = unwaited_s(requests)
    rows = zip(requests["input_tokens"], requests["reused_tokens"], seconds, strict=True)
    return [PrefillPoint(n, p, float(one)) for n, p, one in rows]


def busy_points(requests: pl.DataFrame) -> list[PrefillPoint]:
    """What their prefill instance did for them: so long the next one waits."""
    return [
        PrefillPoint(*row)
        for row in requests.select("input_tokens", "reused_tokens", "prefill_busy_s").iter_rows()
    ]


def handover_points(requests: pl.DataFrame) -> list[HandoverPoint]:
    """The rest of the way to the first token, of those that go on to be decoded."""
    seconds = unwaited_s(requests) - requests["prefill_busy_s"].to_numpy()
    rows = zip(requests["input_tokens"], requests["output_tokens"], seconds, strict=True)
    # What a clock put in order says nothing.
    return [HandoverPoint(n, float(one)) for n, output, one in rows if output > 1 and one > 0]


def unwaited_s(requests: pl.DataFrame) -> Floats:
    """Seconds from sending to the first token, less waiting for other prompts and fetched blocks.

    Some of the way to the prefill instance is no waiting: the least that any request had.
    """
    way_s = (requests["prefill_start_s"] - requests["placed_s"]).to_numpy()
    whole_s = (requests["first_token_s"] - requests["sent_s"]).to_numpy()
    found: Floats = whole_s - (way_s - way_s.min())
    return found


def decode_points(requests: pl.DataFrame, spans: pl.DataFrame) -> Iterator[DecodePoint]:
    """Medians of gaps between tokens, but a request's first: that begins in the midst of a step."""
    requests = requests.drop_nulls("decode_start_s")  # One token only: no step of a batch.
    gaps = (
        spans.join(requests.select("request", "decode"), on="request", how="inner")
        .sort("request", "start_s")
        .with_columns(is_first=pl.col("request") != pl.col("request").shift(1).fill_null(-1))
    )
    parts = [
        steps_of(of, gaps.filter(pl.col("decode") == name))
        for (name,), of in requests.group_by("decode", maintain_order=True)
    ]
    if not parts:
        return
    for (batch,), steps in (
        pl.concat(parts).sort("batch", "context").group_by("batch", maintain_order=True)
    ):
        bins = min(CONTEXTS, steps.height // STEPS_MIN)
        for number in range(bins):
            low, past = steps.height * number // bins, steps.height * (number + 1) // bins
            some = steps[low:past].median()
            yield DecodePoint(int(batch), some["context"][0], some["step_s"][0], past - low)


def steps_of(requests: pl.DataFrame, gaps: pl.DataFrame) -> pl.DataFrame:
    """For each gap on one instance its length, and batch and context in its middle."""
    starts_s, lengths_s = gaps["start_s"].to_numpy(), gaps["first_gap_s"].to_numpy()
    middle_s = starts_s + lengths_s / 2
    joined_s = requests["decode_start_s"].to_numpy()
    left_s = requests["finished_s"].to_numpy()
    prompt = requests["input_tokens"].to_numpy()
    whole = prompt + requests["output_tokens"].to_numpy()
    ones = np.ones(len(prompt))
    tokens_s = np.concatenate([requests["first_token_s"].to_numpy(), starts_s + lengths_s])
    came = so_far(tokens_s, np.ones(len(tokens_s)), middle_s)
    batch = so_far(joined_s, ones, middle_s) - so_far(left_s, ones, middle_s)
    context = so_far(joined_s, prompt, middle_s) + came - so_far(left_s, whole, middle_s)
    frame = pl.DataFrame({"batch": batch.astype(np.int64), "context": context, "step_s": lengths_s})
    return frame.filter(~gaps["is_first"], pl.col("batch") > 0, pl.col("step_s") > 0)


def so_far(times_s: Floats, amounts: Floats, at_s: Floats) -> Floats:
    """The sum of the amounts whose time is not after each of `at_s`."""
    order = np.argsort(times_s, kind="stable")
    sums = np.concatenate([[0.0], np.cumsum(amounts[order])])
    found: Floats = sums[np.searchsorted(times_s[order], at_s, side="right")]
    return found
