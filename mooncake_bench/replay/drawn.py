"""How does a replay that goes on look? A page of figures for Locust's web page: drawn.py DIRECTORY.

A process of its own draws it when somebody asks, so that the one that measures never does.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

from dashboards import explored, figures, page, theme
from dashboards.figures import Curve
from mooncake_bench import explore, metrics
from mooncake_bench.opened import COMPLETE, Opened, open_run
from mooncake_bench.records import RecordsError
from mooncake_bench.slo import NOTHING, percent


def drawn(run: Opened) -> str:
    """The page of a run, with what has ended of it."""
    frame, slo = metrics.windowed(run.frame, run.info.measured_s), run.info.slo
    colour = theme.system_colours([run.info.system])[0]
    summary, goodput = run.summary, run.summary["goodput_rps"]
    lines = [
        f"of {summary['offered']:,} ended requests within {slo}",
        f"goodput {NOTHING if goodput is None else f'{goodput:.3g}'} req/s",
    ]
    parts = []
    for column, what, bound_s in (("ttft_s", "TTFT", slo.ttft_s), ("tbt_s", "TBT", slo.tbt_s)):
        shares = Curve(what, colour, metrics.cumulative_shares(frame, column))
        times = Curve(what, colour, explore.quantiles_over_time(frame, column))
        parts += [
            page.figure(
                figures.cumulative([shares], bound_s, f"{what} (s)"),
                f"{column}-shares",
                f"{what} of the requests",
                "Share of the requests that have ended with at most so much.",
            ),
            page.figure(
                explored.quantiles_over_time([times], f"{what} (s)", bound_s),
                f"{column}-times",
                f"{what} over time",
                "By arrival: p50 dotted, p90 dashed, p99 solid.",
            ),
        ]
    state = run.state if run.info.valid or run.state != COMPLETE else "not valid"
    card = page.card(run.info.name, colour, percent(summary["attainment"]), lines)
    title = f"{run.info.name}: {state}"
    head = f"<header><h1>{escape(title)}</h1></header>"
    reasons = page.banner("Do not rely on it.", run.info.invalid_reasons)
    warning = "" if run.info.valid else reasons
    cards = f'<div class="cards">{card}</div>'
    return page.document(title, f"{head}<main>{warning}{cards}{page.figures(parts)}</main>")


if __name__ == "__main__":
    try:
        sys.stdout.buffer.write(drawn(open_run(Path(sys.argv[1]))).encode())
    except RecordsError as error:
        sys.exit(str(error))
