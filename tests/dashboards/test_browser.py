"""Does the dashboard work in a browser? Chromium touches every control and follows every click."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest

from mooncake_bench import metrics
from mooncake_bench.records import read_run
from mooncake_bench.slo import Slo
from tests.dashboards.browser import expected
from tests.mooncake_bench.conftest import made_up_run

pytest.importorskip("dash", reason="dash is not installed")
pytestmark = [pytest.mark.browser, pytest.mark.dashboards]


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
    seen = watch()
    page = seen.open("/latency?runs=sim-d")
    _, slowest = seen.click("latency-points", pick="t.y.indexOf(Math.max(...t.y))")
    page.wait_for_url("**/request?*")
    page.wait_for_selector('[data-figure="request-journey"] .js-plotly-plot')
    run = read_run(runs / "sim-d")
    frame = metrics.per_request(run.requests, run.spans).filter(status="finished")
    assert slowest == frame.sort("ttft_s")["request"][-1]
    assert page.locator("h3").first.inner_text() == f"Request {slowest} of 8P+8D"


# A page, a figure with points to click, and which of them.
CLICKABLE = [
    ("latency", "latency-cumulative", "5"),
    ("latency", "latency-time", "3"),
    ("request", "request-predictions", "0"),
    ("rejections", "rejections-reasons-live-d", "0"),
]


@pytest.mark.parametrize(("name", "figure", "pick"), CLICKABLE)
def test_every_point_leads_to_its_request(watch: Any, name: str, figure: str, pick: str) -> None:
    """Curves, quantiles, predictions and reasons: each knows which request it is."""
    seen = watch()
    page = seen.open(f"/{name}?runs=live-d")
    # The line of p99 alone has points; of a curve any is one.
    key, request = seen.click(figure, 2 if figure == "latency-time" else 0, pick)
    page.wait_for_url("**/request?*")
    page.wait_for_selector(f"text=Request {request} of 2P+2D")
    assert key == "live-d"


def test_a_cell_of_the_load_map_leads_to_a_request(watch: Any, runs: Path) -> None:
    """To the slowest that the instance began then: it is served by that instance."""
    seen = watch()
    page = seen.open("/cluster?runs=live-d")
    plot = page.locator('[data-figure="cluster-map-live-d"] .js-plotly-plot')
    area = plot.locator(".nsewdrag").first
    area.wait_for()
    area.scroll_into_view_if_needed()
    cell = plot.evaluate(
        """plot => {
          const t = plot._fullData[0], f = plot._fullLayout, row = t.y.indexOf('prefill-0');
          const column = t.z[row].findIndex((_, at) => t.customdata[row][at]?.[1] != null);
          const box = plot.querySelector('.nsewdrag').getBoundingClientRect();
          return {x: box.x + f.xaxis.d2p(t.x[column]), y: box.y + f.yaxis.r2p(row)};
        }"""
    )
    page.mouse.move(cell["x"] - 2, cell["y"])
    page.mouse.move(cell["x"], cell["y"])
    page.wait_for_timeout(200)
    page.mouse.click(cell["x"], cell["y"])
    page.wait_for_selector('[data-figure="request-journey"]')
    number = int(parse_qs(urlparse(page.url).query)["request"][0])
    row = read_run(runs / "live-d").requests.filter(request=number).row(0, named=True)
    assert row["prefill"] == "prefill-0"


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


# ---- every control -----------------------------------------------------------------------------


def test_runs_are_found_by_name_and_sorted(watch: Any) -> None:
    """Typing a part of a name leaves the runs that have it; sorting puts the best first."""
    page = watch().open("/overview")
    names = page.locator('[data-table="runs"] tbody th')
    page.locator("[aria-labelledby=label-find] input").fill("live")
    page.wait_for_selector("text=All runs (2 of 3)")
    assert all("live" in name for name in names.all_inner_texts())
    page.locator("[aria-labelledby=label-find] input").fill("")
    page.wait_for_selector("text=All runs (3 of 3)")
    for label, column, falls in (
        ("attainment", "attainment", True),
        ("goodput", "goodput (req/s)", True),
        ("TTFT p99", "TTFT p99", False),
        ("TBT p99", "TBT p99", False),
        ("offered", "offered (requests)", True),
    ):
        page.locator("[aria-labelledby=label-sort]").get_by_text(label, exact=True).click()
        page.wait_for_function(
            """([column, falls]) => {
              const cells = document.querySelectorAll(`[data-cell$=":${column}"]`);
              const values = Array.from(cells).map(cell => Number(cell.dataset.value));
              const sorted = [...values].sort((a, b) => falls ? b - a : a - b);
              return values.length == 3 && String(values) == String(sorted);
            }""",
            arg=[column, falls],
        )


def test_a_run_in_the_table_leads_to_its_latencies(watch: Any) -> None:
    """Beside those that were chosen."""
    page = watch().open("/overview?runs=live-d")
    page.locator('[data-table="runs"]').get_by_text("8P+8D (sim-d)").click()
    page.wait_for_selector('[data-figure="latency-cumulative"]')
    assert parse_qs(urlparse(page.url).query)["runs"] == ["live-d,sim-d"]


def test_one_goes_back_to_each_run_s_own_bounds(watch: Any, runs: Path) -> None:
    """A link under the numbers, where other bounds were chosen."""
    seen = watch()
    page = seen.open("/slo?runs=live-d,live-c&ttft=2&tbt=60")
    seen.shows("card:live-c", expected(runs / "live-c", Slo(2.0, 0.06)))
    page.get_by_text("Back to each run's own bounds").click()
    seen.shows("card:live-c", expected(runs / "live-c", Slo(30.0, 0.1)))
    assert "ttft" not in page.url


def test_the_field_beside_a_slider_takes_exact_bounds(watch: Any, runs: Path) -> None:
    """Typed instead of dragged."""
    seen = watch()
    page = seen.open("/slo?runs=live-d")
    field = page.locator("[aria-labelledby=label-ttft] input[type=number]")
    field.fill("1.7")
    field.press("Enter")
    page.wait_for_function("location.search.includes('ttft=1.7')")
    seen.shows("card:live-d", expected(runs / "live-d", Slo(1.7, 0.1)))


def test_points_lie_by_what_is_chosen(watch: Any) -> None:
    """Input length or reused tokens, with the axis's title."""
    seen = watch()
    page = seen.open("/latency?runs=sim-d")
    page.wait_for_selector("text=input length (tokens)")
    seen.control("by", "reused tokens")
    page.wait_for_selector("text=TTFT by reused tokens")
    page.wait_for_selector("text=reused (tokens)")
    for label in ("TBT", "TPOT", "end to end", "TTFT"):
        seen.control("time", label)
        page.wait_for_selector(f"text={label} of the requests")


def test_a_request_is_reached_by_run_and_number(watch: Any) -> None:
    """Another run shows its slowest; a number is shown as it is, one that is not there is said."""
    seen = watch()
    page = seen.open("/request?runs=live-d,live-c")
    seen.control("run", "4 colocated")
    page.wait_for_selector("h3:has-text('of 4 colocated')")
    field = page.locator("[aria-labelledby=label-request] input")
    field.fill("7")
    page.wait_for_selector("text=Request 7 of 4 colocated")
    field.fill("123456")
    page.wait_for_selector("text=has no request 123456")


def test_every_measure_of_instances_can_be_seen(watch: Any) -> None:
    """Load, waiting, running, context."""
    seen = watch()
    page = seen.open("/cluster?runs=live-d")
    for label in ("waiting requests", "running requests", "context in the batch", "load"):
        seen.control("measure", label)
        page.wait_for_selector(f"text={label.capitalize()} of every instance")


def test_the_theme_can_be_chosen(watch: Any) -> None:
    """Whatever the system's is, and back to the system's."""
    seen = watch(scheme="light")
    page = seen.open("/overview")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    seen.control("theme", "dark")
    page.wait_for_function(f"{paper} != '{light}'")
    seen.control("theme", "auto")
    page.wait_for_function(f"{paper} == '{light}'")
    seen.control("theme", "light")
    page.wait_for_function("document.documentElement.dataset.theme == 'light'")


def test_many_runs_are_chosen_from_a_menu(watch: Any, tmp_path: Path) -> None:
    """More than fit as boxes: a list to search in, with a cross at each chosen one."""
    for number in range(10):
        made_up_run(tmp_path / f"run-{number}", name=f"run {number}", requests=30)
    page = watch(tmp_path).open("/overview?runs=run-0")
    menu = page.locator("[aria-labelledby=label-runs]")
    menu.locator("button").first.click()
    page.get_by_role("option", name="run-7").click()
    page.wait_for_function("location.search.includes('run-7')")
    page.wait_for_selector('[data-cell="card:run-7"]')
    assert page.locator(".card").count() == 2


def test_plans_are_chosen_by_name(watch: Any, two_plans: Path) -> None:
    """The page shows the one that the control names."""
    seen = watch(two_plans)
    page = seen.open("/plan")
    page.wait_for_selector("text=Plan first")
    seen.control("plan", "second")
    page.wait_for_selector("h3:has-text('Plan second')")
    page.reload()
    page.wait_for_selector("h3:has-text('Plan second')")


def test_the_page_is_reached_past_the_links(watch: Any) -> None:
    """The first thing that Tab comes to skips navigation and controls."""
    page = watch().open("/overview")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the page"
    page.keyboard.press("Enter")
    page.wait_for_function("location.hash == '#page'")
    page.wait_for_selector(".card")
