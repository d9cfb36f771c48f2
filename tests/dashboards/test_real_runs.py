"""Do all pages hold over a real comparison? The demo's: live 2P+2D, and a simulated hour of 8P+8D.

With MOONCAKE_DEMO, a directory that `mooncake-bench demo --out` has written, over those runs; else
over runs made here, whose live part is shorter. MOONCAKE_SCREENSHOTS names a directory for a
picture of every page.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import polars as pl
import pytest

from mooncake_bench.records import read_frame
from mooncake_bench.slo import Slo
from tests.dashboards.browser import PAGES, expected

pytest.importorskip("dash", reason="dash is not installed")
pytestmark = [pytest.mark.browser, pytest.mark.dashboards]
COMPARISONS = {
    "live": "live-2p2d,live-4-colocated",
    "simulated": "simulated-8p8d,simulated-16-colocated",
}
LOOKS = [(1280, "light"), (390, "dark"), (1280, "dark"), (390, "light")]


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("which", COMPARISONS)
def test_every_page_of_a_real_comparison(
    watch: Any, demo_runs: Path, two_plans: Path, which: str, name: str
) -> None:
    """On a desk and on a phone, light and dark: drawn whole, nothing upon anything, no error."""
    pictures = os.environ.get("MOONCAKE_SCREENSHOTS")
    for width, scheme in LOOKS if pictures else LOOKS[:2]:
        seen = watch(demo_runs, two_plans, width=width, scheme=scheme)
        page = seen.open(f"/{name}?runs={COMPARISONS[which]}")
        seen.drawn()
        # A run that refused nothing has no figure of that.
        assert page.locator(".js-plotly-plot").count() > 0 or name == "rejections"
        assert page.locator("[role=alert]").all_inner_texts() == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if pictures:
            path = Path(pictures) / f"{name}-{which}-{width}-{scheme}.png"
            page.screenshot(path=path, full_page=True)
        assert seen.clashes() == []


@pytest.mark.parametrize("which", COMPARISONS)
def test_the_sliders_say_what_metrics_computes(watch: Any, demo_runs: Path, which: str) -> None:
    """By keyboard, to other bounds and another statistic; a reload keeps them."""
    seen = watch(demo_runs)
    page = seen.open(f"/slo?runs={COMPARISONS[which]}")
    thumbs = page.locator("#controls [role=slider]")
    thumbs.nth(0).focus()
    page.keyboard.press("Home")
    page.wait_for_function("new URLSearchParams(location.search).has('ttft')")
    for _ in range(9):
        page.keyboard.press("ArrowRight")
    thumbs.nth(1).focus()
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("new URLSearchParams(location.search).has('tbt')")
    page.locator("#controls").get_by_text("99th percentile of gaps", exact=True).click()
    page.wait_for_function("location.search.includes('stat=tbt_s_p99')")
    page.wait_for_function("location.search.includes('ttft=1')")
    for turn in ("chosen", "reloaded"):
        query = parse_qs(urlparse(page.url).query)
        slo = Slo(float(query["ttft"][0]), float(query["tbt"][0]) / 1e3)
        for run in COMPARISONS[which].split(","):
            seen.shows(f"card:{run}", expected(demo_runs / run, slo, "tbt_s_p99"))
        if turn == "chosen":
            page.reload()


@pytest.mark.parametrize("which", COMPARISONS)
def test_a_slow_request_s_journey_is_whole(watch: Any, demo_runs: Path, which: str) -> None:
    """A click on the slowest point: its chunks, its transfer, and what was predicted."""
    run = COMPARISONS[which].split(",")[0]
    seen = watch(demo_runs)
    page = seen.open(f"/latency?runs={run}")
    _, request = seen.click("latency-points", pick="t.y.indexOf(Math.max(...t.y))")
    page.wait_for_selector('[data-figure="request-first-token"] .js-plotly-plot .main-svg')
    page.wait_for_selector('[data-figure="request-predictions"] .js-plotly-plot .main-svg')
    row = read_frame(demo_runs / run / "requests.parquet", "requests").filter(request=request)
    chunks = pl.read_parquet(demo_runs / run / "chunks.parquet").filter(request=request)
    note = page.locator('[data-figure="request-first-token"] figcaption').inner_text()
    told = f"{chunks.height} chunks" if chunks.height else "in one go"
    assert told in note
    assert "sent layer by layer" in note
    assert row["transfer_start_s"].item() < row["prefill_end_s"].item()
    computed = (row["input_tokens"] - row["reused_tokens"]).item()
    assert not chunks.height or chunks["tokens"].sum() == computed


@pytest.mark.parametrize("which", COMPARISONS)
def test_the_cache_is_shown_with_replicas_evictions_and_reuse(
    watch: Any, demo_runs: Path, which: str
) -> None:
    """Each has a figure; whoever keeps no prefixes is said to have no replicas."""
    seen = watch(demo_runs)
    page = seen.open(f"/cache?runs={COMPARISONS[which]}")
    for figure in ("cache-hits", "cache-replicas", "cache-evictions", "cache-reuse"):
        page.wait_for_selector(f'[data-figure="{figure}"] .js-plotly-plot .main-svg')


@pytest.mark.parametrize("kind", ["PNG", "SVG", "HTML", "CSV", "Parquet"])
def test_every_page_exports(watch: Any, demo_runs: Path, two_plans: Path, kind: str) -> None:
    """The first figure of every page, in every form."""
    seen = watch(demo_runs, two_plans)
    for name in PAGES:
        page = seen.open(f"/{name}?runs={COMPARISONS['live']}")
        if name == "rejections" and not page.locator("[data-figure]").count():
            continue
        frame = page.locator("[data-figure]").first
        frame.locator("svg.main-svg").first.wait_for()
        with page.expect_download() as download:
            frame.locator(".exports").get_by_text(kind, exact=True).click()
        assert Path(download.value.path()).stat().st_size > 100, name
        assert download.value.suggested_filename.endswith(f".{kind.lower()}")
