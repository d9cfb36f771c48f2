"""What became of every request that was offered, each counted once?"""

from __future__ import annotations

from typing import Any

import polars as pl

ABANDONED = ("no first token within", "no token for", "no end within", "interrupted")
"""How the reasons begin with which the client gave a request up."""


def accounting(frame: pl.DataFrame) -> dict[str, Any]:
    """What became of every offered request, each counted once, and what was sent for them.

    offered = finished + rejected_early + failed_late + abandoned (the client gave up: a timeout,
    an interruption) + not_sent (failed before it could be sent: no connection, a lost worker).
    `attempts` counts sends: more than `sent` where rejected requests were retried.
    """
    failed = pl.col("status") == "failed"
    given_up = failed & pl.any_horizontal(
        pl.col("reason").fill_null("").str.starts_with(start) for start in ABANDONED
    )
    sent = pl.col("sent_s").is_not_null()
    attempts = pl.col("attempts") if "attempts" in frame.columns else pl.lit(None, pl.Int64)
    counts = frame.select(
        offered=pl.len(),
        sent=sent.sum(),
        attempts=attempts.fill_null(sent.cast(pl.Int64)).sum(),
        finished=(pl.col("status") == "finished").sum(),
        rejected_early=(pl.col("status") == "rejected").sum(),
        failed_late=(failed & sent & ~given_up).sum(),
        abandoned=(failed & given_up).sum(),
        not_sent=(failed & ~sent & ~given_up).sum(),
    )
    return counts.row(0, named=True)
