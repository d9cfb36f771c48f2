"""Does the page say what was run and how it went, to a reader and in a browser?"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from mooncake_bench.records import SERVER_METRICS, RecordsError, Run, RunInfo, write_run
from mooncake_bench.report import write_report
from mooncake_bench.slo import Slo

ARun = Callable[..., Run]

FIGURES = (
    "capacity",
    "attainment",
    "ttft",
    "tbt",
    "stages-ttft",
    "stages-decode",
    "input-ttft",
    "input-decode",
    "load",
    "hits",
    "pool",
)


def text_of(page: Path) -> str:
    """What a reader sees: no scripts, styles or tags, one space between words."""
    html = re.sub(r"<(script|style)[\s\S]*?</\1>", " ", page.read_text(encoding="utf-8"))
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_the_page_answers_the_question_for_each_group(four_runs: list[Run], tmp_path: Path) -> None:
    """Both comparisons are on the page, each with its verdict, its origin and its provenance."""
    text = text_of(write_report(four_runs, tmp_path / "report.html"))
    assert "Live: conversation-like" in text
    assert "Simulated: conversation-like" in text
    assert "disaggregated 8P+8D met TTFT ≤ 30 s and TBT ≤ 100 ms for" in text
    assert "2P+2D against 4 colocated" in text
    assert "Simulated: no request was sent and no GPU was used." in text
    assert "Live with modelled engines" in text
    assert "Its known error: prefill within 4.3 % of every published point" in text
    assert four_runs[0].info.trace["sha256"] in text
    assert "client lag p50, p99" in text
    assert "31 % of a core" in text


def test_the_page_is_one_file_of_bearable_size(four_runs: list[Run], tmp_path: Path) -> None:
    """Plotly is inlined once; curves are thinned out; nothing is linked from elsewhere."""
    page = write_report(four_runs, tmp_path / "new" / "report.html")
    assert page.stat().st_size < 6_000_000
    html = page.read_text(encoding="utf-8")
    outside_scripts = re.sub(r"<script[\s\S]*?</script>", "", html)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", outside_scripts)
    assert "@import" not in outside_scripts


def test_the_same_runs_give_the_same_page(four_runs: list[Run], tmp_path: Path) -> None:
    """No random ids, no time of writing: reports can be compared as files."""
    first = write_report(four_runs, tmp_path / "a.html").read_bytes()
    assert write_report(four_runs, tmp_path / "b.html").read_bytes() == first


def test_an_invalid_run_cannot_be_overlooked(a_run: ARun, tmp_path: Path) -> None:
    """A banner with the reason, and a doubt beside the verdict at the top."""
    runs = [
        a_run("d", requests=60),
        a_run("c", requests=60, system="colocated", valid=False, invalid_reasons=["lag p99 2.1 s"]),
    ]
    page = write_report(runs, tmp_path / "report.html")
    text = text_of(page)
    assert "Not a valid run: 16 colocated. Do not rely on it. lag p99 2.1 s" in text
    assert "not valid: 8P+8D against 16 colocated" in text
    assert 'role="alert"' in page.read_text(encoding="utf-8")


def test_strings_of_a_run_are_never_markup(a_run: ARun, tmp_path: Path) -> None:
    """Names, reasons and configuration come from files: they are text, in tables and in figures."""
    evil = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'
    run = a_run(
        "d",
        requests=60,
        reject=0.3,
        source="external",
        system="external",
        name=evil,
        trace_name=evil,
        config={"model": evil},
        warnings=[evil],
        valid=False,
        invalid_reasons=[evil],
    )
    html = write_report([run], tmp_path / "report.html", title=evil).read_text(encoding="utf-8")
    assert "<img" not in re.sub(r"<script>/\*\*[\s\S]*?</script>", "", html, count=1)
    assert '<script>alert("x")' not in html
    assert "&lt;/script&gt;" in html


def test_fates_classes_and_the_servers_own_metrics_are_shown(a_run: ARun, tmp_path: Path) -> None:
    """Two classes with bounds of their own, each request sent twice, a server with one gauge."""
    plain = a_run("d", requests=40, source="external", system="external")
    requests = plain.requests.with_columns(
        pl.Series("class", ["chat", "batch"] * 20), attempts=pl.lit(2, pl.Int64)
    )
    plain.info.slo_by_class["chat"] = Slo(1.5, 0.04)
    rows = [(float(at), "vllm:num_requests_waiting", "", at % 3.0) for at in range(9)]
    said = pl.DataFrame(rows, schema=SERVER_METRICS, orient="row")
    run = write_run(tmp_path / "run", plain.info, requests, plain.spans, plain.samples, said)
    page = write_report([run], tmp_path / "report.html")
    text = text_of(page)
    assert "sent 40 sends, with retries 80 finished 40 rejected early 0 failed late 0" in text
    assert "batch: offered 20" in text
    assert "chat: offered 20 within TTFT ≤ 1.5 s, TBT ≤ 40 ms" in text
    html = page.read_text(encoding="utf-8")
    assert 'id="g0-server-waiting"' in html
    assert 'id="g0-server-running"' not in html


def test_a_run_with_nothing_finished_still_has_a_page(a_run: ARun, tmp_path: Path) -> None:
    """Everything rejected: numbers are dashes, figures are empty or absent."""
    refused = a_run("d", requests=30, reject=3.0)
    assert refused.summary["finished"] == 0
    text = text_of(write_report([refused], tmp_path / "report.html"))
    assert "30 rejected or failed" in text
    assert "0 % of requests" in text


def test_a_run_without_any_request_has_a_page(a_run: ARun, tmp_path: Path) -> None:
    """A run that was interrupted before its first request must not stop the others' report."""
    empty = write_run(
        tmp_path / "empty",
        RunInfo(name="early", source="live-vllm", system="external"),
        pl.DataFrame(),
    )
    text = text_of(write_report([empty, a_run("d", requests=30)], tmp_path / "report.html"))
    assert "No request was offered to early." in text
    assert "Simulated: conversation-like" in text


def test_several_rates_show_what_each_system_can_take(a_run: ARun, tmp_path: Path) -> None:
    """Two speeds of one trace: attainment over rate, and a sentence on where capacity lies."""
    trace = {"name": "conversation-like", "sha256": "5d1c"}
    runs = [
        a_run("d1", trace={**trace, "transforms": ["speed 1"]}, rps=2.0),
        a_run("d2", trace={**trace, "transforms": ["speed 2"]}, rps=4.0),
        a_run("c1", trace={**trace, "transforms": ["speed 1"]}, rps=2.0, system="colocated"),
        a_run("c2", trace={**trace, "transforms": ["speed 2"]}, rps=4.0, reject=0.5),
    ]
    text = text_of(write_report([runs[0], runs[1], runs[2]], tmp_path / "report.html"))
    assert re.search(r"8P\+8D held 90 % up to [34]\.\d+ req/s, the highest rate tried", text)
    assert re.search(r"16 colocated was below 90 % already at [12]\.\d+ req/s", text)
    text = text_of(write_report([runs[0], runs[3]], tmp_path / "report.html"))
    assert re.search(r"8P\+8D held 90 % at .* req/s and no longer at .*: its capacity is", text)


def test_what_cannot_be_reported_is_a_one_line_error(a_run: ARun, tmp_path: Path) -> None:
    """No runs, or a place that cannot be written to."""
    with pytest.raises(RecordsError, match="no runs to report"):
        write_report([], tmp_path / "report.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordsError, match="cannot write the report"):
        write_report([a_run("d", requests=20)], tmp_path / "file" / "report.html")


# --- In a browser -------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (400, "dark")])
def test_every_figure_is_drawn(
    four_runs: list[Run], tmp_path: Path, chromium: Any, width: int, scheme: str
) -> None:
    """No console error, no request but the file, no sideways scrolling, every figure has a size."""
    page_file = write_report(four_runs, tmp_path / "report.html")
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    errors: list[str] = []
    asked: list[str] = []
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    expected = [f"{group}-{name}" for group in ("g0", "g1") for name in FIGURES] + ["g0-refusals"]
    for name in expected:
        page.wait_for_selector(f"#{name} svg.main-svg")
        box = page.locator(f"#{name} svg.main-svg").first.bounding_box()
        assert box["width"] > 200, name
        assert box["height"] > 100, name
        assert box["x"] + box["width"] <= width, name
    assert page.locator(".js-plotly-plot").count() == len(expected)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert errors == []
    assert asked == [page_file.as_uri()]


@pytest.mark.browser
def test_figures_are_readable_in_dark_mode(
    four_runs: list[Run], tmp_path: Path, chromium: Any
) -> None:
    """The stand-in ink of the figures is repainted: no near-black text on a near-black card."""
    page_file = write_report(four_runs[:2], tmp_path / "report.html")
    page = chromium.new_page(color_scheme="dark")
    page.goto(page_file.as_uri())
    page.wait_for_selector("#g0-ttft svg.main-svg")
    fills = page.eval_on_selector_all(
        ".js-plotly-plot text", "nodes => nodes.map(node => getComputedStyle(node).fill)"
    )
    assert fills
    assert not [
        fill for fill in fills if fill in ("rgb(17, 17, 17)", "rgb(85, 85, 85)", "rgb(0, 0, 0)")
    ]
