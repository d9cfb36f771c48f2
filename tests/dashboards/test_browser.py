"""Does the dashboard work in a browser? Chromium goes over every page and every control."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import polars as pl
import pytest

from mooncake_bench import metrics
from mooncake_bench.records import read_run
from mooncake_bench.slo import Slo

pytest.importorskip("dash", reason="dash is not installed")
pytestmark = pytest.mark.browser
PAGES = ("overview", "slo", "latency", "request", "cluster", "cache", "rejections", "plan")


class Watched:
    """A page that remembers what went wrong and what it asked for."""

    def __init__(self, chromium: Any, url: str, width: int = 1280, scheme: str = "light") -> None:
        self.url = url
        self.page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.errors: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._asked)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.errors.append(f"asked for {request.url}")

    def open(self, path: str) -> Any:
        self.page.goto(self.url + path)
        self.page.wait_for_selector("#page > *")
        self.page.wait_for_selector("#controls .control")
        return self.page

    def shows(self, cell: str, value: float) -> None:
        """Wait until the page says so: a crowded machine takes its time."""
        self.page.wait_for_function(
            '([cell, value]) => Math.abs(document.querySelector(`[data-cell="${cell}"]`)'
            "?.dataset.value - value) < 1e-12",
            arg=[cell, value],
        )

    def drawn(self) -> None:
        """Wait until every figure of the page has its drawing."""
        self.page.wait_for_function(
            "document.querySelectorAll('[data-figure]').length == "
            "document.querySelectorAll('.js-plotly-plot .main-svg:first-child').length"
        )

    def number(self, cell: str) -> float:
        found = self.page.wait_for_selector(f'[data-cell="{cell}"]')
        return float(found.get_attribute("data-value"))


@pytest.fixture
def watch(chromium: Any, runs: Path, serving: Callable[..., str]) -> Any:
    url = serving(runs)
    opened: list[Watched] = []

    def start(**options: Any) -> Watched:
        opened.append(Watched(chromium, url, **options))
        return opened[-1]

    yield start
    for one in opened:
        one.page.close()
        assert one.errors == []


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_drawn(watch: Any, name: str, width: int, scheme: str) -> None:
    """Figures have a size and stay on the page; nothing scrolls sideways; nothing is fetched."""
    seen = watch(width=width, scheme=scheme)
    page = seen.open(f"/{name}")
    seen.drawn()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    plots = page.locator(".js-plotly-plot")
    assert plots.count() > 0 or name == "plan"
    for at in range(plots.count()):
        box = plots.nth(at).locator("svg.main-svg").first.bounding_box()
        assert box["width"] > 200
        assert box["x"] + box["width"] <= width
    assert page.locator("[role=alert]").count() == 0


def expected(directory: Path, slo: Slo, statistic: str = "tbt_s") -> float:
    run = read_run(directory)
    frame = metrics.per_request(run.requests, run.spans)
    frame = frame.with_columns(pl.col(statistic).alias("tbt_s"))
    return float(metrics.attained(frame, slo).sum()) / frame.height


def test_moving_the_sliders_changes_the_numbers_to_what_metrics_computes(
    watch: Any, runs: Path
) -> None:
    """By keyboard: to another TTFT bound, another TBT bound, another statistic."""
    seen = watch()
    page = seen.open("/slo?runs=live-d,live-c")
    before = seen.number("card:live-d")
    assert before == expected(runs / "live-d", Slo(30.0, 0.1))
    thumbs = page.locator("#controls [role=slider]")
    thumbs.nth(0).focus()
    page.keyboard.press("Home")
    page.keyboard.press("PageUp")
    page.wait_for_function("new URLSearchParams(location.search).has('ttft')")
    thumbs.nth(1).focus()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    page.locator("#controls").get_by_text("longest gap", exact=True).click()
    page.wait_for_function("location.search.includes('stat=tbt_s_max')")
    page.wait_for_function("new URLSearchParams(location.search).has('tbt')")
    query = parse_qs(urlparse(page.url).query)
    slo = Slo(float(query["ttft"][0]), float(query["tbt"][0]) / 1e3)
    assert slo.ttft_s < 30.0
    assert slo.tbt_s < 0.1
    for name in ("live-d", "live-c"):
        seen.shows(f"card:{name}", expected(runs / name, slo, "tbt_s_max"))
    assert seen.number("card:live-d") != before


def test_clicking_a_slow_request_opens_its_journey(watch: Any, runs: Path) -> None:
    """The highest point of the scatter leads to that request's page."""
    page = watch().open("/latency?runs=sim-d")
    plot = page.locator('[data-figure="latency-points"] .js-plotly-plot')
    plot.locator(".point").first.wait_for()
    plot.scroll_into_view_if_needed()
    highest = plot.evaluate(
        """plot => {
          const t = plot._fullData[0], ys = Array.from(t.y), i = ys.indexOf(Math.max(...ys));
          const box = plot.querySelector('.nsewdrag').getBoundingClientRect(), f = plot._fullLayout;
          return {x: box.x + f.xaxis.d2p(t.x[i]), y: box.y + f.yaxis.d2p(t.y[i]),
                  request: t.customdata[i][1]};
        }"""
    )
    page.mouse.move(highest["x"] - 3, highest["y"])
    page.mouse.move(highest["x"], highest["y"])
    page.wait_for_timeout(200)
    page.mouse.click(highest["x"], highest["y"])
    page.wait_for_url("**/request?*")
    page.wait_for_selector('[data-figure="request-journey"] .js-plotly-plot')
    run = read_run(runs / "sim-d")
    frame = metrics.per_request(run.requests, run.spans).filter(status="finished")
    assert highest["request"] == frame.sort("ttft_s")["request"][-1]
    assert page.locator("h3").first.inner_text() == f"Request {highest['request']} of 8P+8D"


def test_the_slowest_are_reached_by_keyboard_alone(watch: Any) -> None:
    """A link in the table, focused and followed with Enter."""
    page = watch().open("/latency?runs=sim-d")
    link = page.locator('[data-table="slowest"] tbody a').first
    name = link.inner_text().split(",")[0]
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector('[data-figure="request-journey"]')
    assert page.locator("h3").first.inner_text().startswith(name.capitalize())


def test_a_click_into_the_surface_chooses_the_bounds(watch: Any, runs: Path) -> None:
    """Attainment becomes that of the pair of bounds under the pointer."""
    seen = watch()
    page = seen.open("/slo?runs=live-c")
    plot = page.locator('[data-figure="slo-surface-live-c"] .js-plotly-plot')
    area = plot.locator(".nsewdrag").first
    area.wait_for()
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.7)
    page.wait_for_timeout(200)
    page.mouse.click(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.7)
    page.wait_for_function("new URLSearchParams(location.search).has('ttft')")
    query = parse_qs(urlparse(page.url).query)
    slo = Slo(float(query["ttft"][0]), float(query["tbt"][0]) / 1e3)
    seen.shows("card:live-c", expected(runs / "live-c", slo))


@pytest.mark.parametrize("kind", ["PNG", "SVG", "HTML", "CSV", "Parquet"])
def test_a_figure_is_exported(watch: Any, tmp_path: Path, kind: str) -> None:
    """Each way leads to a file that begins as files of that kind do."""
    page = watch().open("/latency?runs=live-d")
    frame = page.locator('[data-figure="latency-cumulative"]')
    frame.locator("svg.main-svg").first.wait_for()
    with page.expect_download() as download:
        frame.locator(".exports").get_by_text(kind, exact=True).click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    begins = {
        "PNG": b"\x89PNG",
        "SVG": b"<svg",
        "HTML": b"<!doctype html>",
        "CSV": b"run,",
        "Parquet": b"PAR1",
    }
    assert path.read_bytes().startswith(begins[kind])
    assert path.suffix == f".{kind.lower()}"


def test_a_reload_shows_the_same(watch: Any) -> None:
    """Every choice is in the address: runs, time, theme."""
    page = watch().open("/latency")
    page.locator("#controls").get_by_text("live-c", exact=True).click()
    page.locator("#controls").get_by_text("TPOT", exact=True).click()
    page.locator("#controls").get_by_text("dark", exact=True).click()
    page.wait_for_function("location.search.includes('theme=dark')")
    page.wait_for_timeout(800)
    titles = page.locator("figure h4").all_inner_texts()
    page.reload()
    page.wait_for_selector("figure h4")
    page.wait_for_selector("#controls .control")
    assert page.locator("figure h4").all_inner_texts() == titles
    assert "TPOT of the requests" in titles
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    checked = page.locator("#controls input:checked").evaluate_all(
        "boxes => boxes.map(box => box.parentElement.closest('label').innerText.trim())"
    )
    assert "live-c" not in checked
    assert {"TPOT", "dark", "live-d", "sim-d"} <= set(checked)


def test_going_back_sets_the_controls_back(watch: Any) -> None:
    """The browser's own button works between pages and choices."""
    page = watch().open("/latency?runs=live-d")
    page.locator("nav").get_by_text("Cluster", exact=True).click()
    page.wait_for_selector('[data-figure="cluster-map-live-d"]')
    page.locator("#controls").get_by_text("waiting requests", exact=True).click()
    page.wait_for_selector("text=Waiting requests of every instance")
    page.go_back()
    page.wait_for_selector("text=Load of every instance")
    page.go_back()
    page.wait_for_selector('[data-figure="latency-cumulative"]')
