"""What is typed to fit a generator to a trace? `mooncake-bench trace fit TRACE --out FIT.toml`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from mooncake_bench.plan.spec import Promise
from mooncake_bench.slo import parse_slo, percent, seconds

if TYPE_CHECKING:
    from mooncake_bench.plan.fitting import Compared


def trace_fit(
    trace: Annotated[str, typer.Argument(help="trace file or generator")],
    out: Annotated[Path, typer.Option(help="the TOML to write; use it wherever a trace goes")],
    jitter_stamps: Annotated[
        bool, typer.Option("--jitter/--no-jitter", help="spread arrivals inside their buckets")
    ] = True,
    profile: Annotated[str, typer.Option(help="cost profile of the comparison")] = (
        "a800-llama3-70b"
    ),
    slo: Annotated[str, typer.Option(help="of the comparison")] = "ttft<30s,tbt<200ms",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Fit a generator to a trace, to plan with or to share instead of it; says how good it is."""
    from mooncake_bench.plan.fitting import compare, prepared, simulated
    from workloads.fit import fit, open_fitted, write_fitted

    bounds = parse_slo(slo)
    own = prepared(trace, jitter_stamps, seed)
    fitted = fit(own, seed)
    write_fitted(
        fitted,
        out,
        f"Fitted to {own.name}, {own.frame.height} requests, by trace fit: no row of it.",
    )
    promise = Promise(bounds.ttft_s, bounds.tbt_s)
    # Another seed than the one that the reuse was calibrated with.
    found = compare(own, open_fitted(out, seed=seed + 1))
    found += simulated(trace, jitter_stamps, out, promise, profile, seed + 1)
    quality = out.with_suffix(".quality.json")
    quality.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    show(found, out, quality)


def show(found: Sequence[Compared], out: Path, quality: Path) -> None:
    results = Console()
    table = Table("", "trace", "fitted", "difference", box=None)
    for one in found:
        table.add_row(one.what, said(one, one.trace), said(one, one.fitted), difference(one))
    Console(width=max(results.width, 100)).print(table)
    results.print(f"written to {out} and {quality}", highlight=False, soft_wrap=True)


def said(one: Compared, value: float) -> str:
    if one.unit == "share":
        return percent(value)
    if one.unit == "s":
        return seconds(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g} {one.unit}".strip()


def difference(one: Compared) -> str:
    if one.unit == "share":
        return f"{100 * (one.fitted - one.trace):+.1f} points"
    return f"{one.fitted / one.trace - 1:+.1%}" if one.trace else ""
