"""Do the pages say what metrics says, and what is wrong with a directory, in one line?"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import polars as pl
import pytest

from mooncake_bench import metrics
from mooncake_bench.records import read_run, write_run
from mooncake_bench.slo import Slo
from tests.mooncake_bench.conftest import made_up_run

pytest.importorskip("dash", reason="dash is not installed")

from dashboards.app.parts import Alarm, Panel, Part, Table, Words  # After the skip.
from dashboards.app.server import PAGES, parts_of
from dashboards.app.state import State
from dashboards.app.store import Store
from dashboards.app.view import View

Serving = Callable[..., str]


def page(root: Path, name: str, search: str = "") -> list[Part]:
    return parts_of(View.of(Store([root]), State.of(search), f"/{name}"))


def numbers(parts: list[Part], key: str) -> dict[str, list[float | None]]:
    """A table's numbers by the name of their row."""
    table = next(part for part in parts if isinstance(part, Table) and part.key == key)
    return {row[0].text: [cell.value for cell in row[1:]] for row in table.rows}


def problems(parts: list[Part]) -> str:
    alarms = [part for part in parts if isinstance(part, Alarm)]
    return " ".join(reason for alarm in alarms for reason in (alarm.title, *alarm.reasons))


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_has_units_a_note_and_its_data(runs: Path, name: str) -> None:
    """No axis of numbers is without a title that names its unit, and no figure without data."""
    parts = page(runs, name)
    assert not problems(parts)
    panels = [part for part in parts if isinstance(part, Panel)]
    assert panels or name == "plan"
    for panel in panels:
        assert panel.note, panel.key
        assert panel.frame.height, panel.key
        layout = panel.figure.layout.to_plotly_json()
        axes = {key: axis for key, axis in layout.items() if key[1:5] == "axis"}
        titled = {key[0] for key, axis in axes.items() if axis.get("title", {}).get("text")}
        named = {key[0] for key, axis in axes.items() if _names_things(axis)}
        # Panels over one another say their unit in their titles.
        if len(axes) == 2:
            assert titled | named == {"x", "y"}, panel.key
        assert "x" in titled, panel.key


def _names_things(axis: dict[str, object]) -> bool:
    return axis.get("type") == "category" or bool(axis.get("ticktext"))


@pytest.mark.parametrize("statistic", ["tbt_s", "tbt_s_p99", "tbt_s_max", "tpot_s"])
def test_the_slo_page_says_what_metrics_computes(runs: Path, statistic: str) -> None:
    """Attainment and goodput at chosen bounds, for each statistic that can be held to them."""
    slo = Slo(4.0, 0.07)
    parts = page(runs, "slo", f"?runs=live-d,live-c&ttft=4&tbt=70&stat={statistic}")
    found = numbers(parts, "judgement")
    for at, name in enumerate(("live-d", "live-c")):
        run = read_run(runs / name)
        frame = metrics.per_request(run.requests, run.spans)
        frame = frame.with_columns(pl.col(statistic).alias("tbt_s"))
        met = metrics.attained(frame, slo)
        assert found["attainment"][at] == met.sum() / frame.height
        ends_s = max(frame["arrival_s"].max(), frame["finished_s"].max())
        assert found["goodput (req/s)"][at] == met.sum() / ends_s


def test_with_its_own_bounds_a_run_is_what_its_summary_says(runs: Path) -> None:
    """No bound chosen: the cards and the table repeat summary.json."""
    found = numbers(page(runs, "slo", "?runs=live-d,sim-d"), "judgement")
    summaries = [read_run(runs / name).summary for name in ("live-d", "sim-d")]
    assert found["attainment"] == [one["attainment"] for one in summaries]
    assert found["goodput (req/s)"] == [one["goodput_rps"] for one in summaries]


def test_the_table_of_runs_can_be_searched_and_sorted(runs: Path) -> None:
    """By name, and by attainment with the best first."""
    found = numbers(page(runs, "overview", "?find=live&sort=attainment"), "runs")
    assert list(found) == sorted(found, key=lambda name: -(found[name][4] or 0.0))
    assert all("live" in name for name in found)
    assert len(found) == 2


def test_a_request_is_shown_as_its_record_says(runs: Path) -> None:
    """Its stages add up to its time from arrival to end; predicted and happened stand together."""
    run = read_run(runs / "sim-d")
    row = metrics.per_request(run.requests, run.spans).filter(status="finished").row(7, named=True)
    parts = page(runs, "request", f"?run=sim-d&runs=live-d,sim-d&request={row['request']}")
    journey = next(p for p in parts if isinstance(p, Panel) and p.key == "request-journey")
    assert journey.frame["end_s"].max() == pytest.approx(row["e2e_s"])
    assert numbers(parts, "expected")["TTFT, from intended arrival"][1] == row["ttft_s"]


def test_a_number_that_no_request_has_is_said(runs: Path) -> None:
    """A line, no empty figure."""
    parts = page(runs, "request", "?run=sim-d&request=999999")
    assert any(isinstance(part, Words) and "no request 999999" in part.text for part in parts)


def test_a_state_survives_the_way_through_an_address() -> None:
    """What was chosen is what is read back; nonsense is as if it were not there."""
    state = State(runs="a,b/c", ttft=1.5, tbt=70.0, stat="tbt_s_max", find="x y", request=3)
    assert State.of(state.search) == state
    assert State().search == ""
    assert State.of("?ttft=no&stat=evil&request=&tbt=inf&page=slo") == State()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: [(directory / name).write_bytes(content), None][1]


def change_info(**changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        info = json.loads((directory / "run.json").read_text())
        (directory / "run.json").write_text(json.dumps(info | changes))

    return change


def cut(name: str) -> Callable[[Path], None]:
    def halve(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: len(content) // 2])

    return halve


def without(*names: str) -> Callable[[Path], None]:
    def remove(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return remove


def without_column(directory: Path) -> None:
    path = directory / "requests.parquet"
    pl.read_parquet(path).drop("input_tokens").write_parquet(path)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "foreign": (
        write("run.json", b'{"hello": 1}'),
        "no schema_version; is this a run of mooncake-bench?",
    ),
    "a list": (write("run.json", b"[1, 2]"), "not a JSON object"),
    "no text": (write("run.json", b"\xff\xfe\x00"), "broken JSON"),
    "nothing": (write("run.json", b""), "broken JSON"),
    "newer": (change_info(schema_version=99), "schema version 99"),
    "no number": (change_info(schema_version="one"), "no schema_version"),
    "wrong field": (change_info(slo="fast"), "slo"),
    "cut requests": (cut("requests.parquet"), "truncated or not Parquet"),
    "cut samples": (cut("samples.parquet"), "truncated or not Parquet"),
    "no requests": (write("requests.parquet", b"PAR1"), "truncated or not Parquet"),
    "other columns": (without_column, "column 'input_tokens' is missing"),
    "cut summary": (cut("summary.json"), "broken JSON"),
    "gone": (without("spans.parquet", "tbt.parquet"), "the run was not written to its end"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_run_is_one_line_and_the_others_are_shown(
    runs: Path, tmp_path: Path, how: str
) -> None:
    """On every page that would show it; the whole run beside it is there."""
    shutil.copytree(runs / "live-d", tmp_path / "broken")
    shutil.copytree(runs / "live-c", tmp_path / "whole")
    change, said = BROKEN[how]
    change(tmp_path / "broken")
    for name in PAGES:
        parts = page(tmp_path, name)
        assert said in problems(parts), name
        assert "Cannot be shown" in problems(parts), name
        assert "Traceback" not in problems(parts), name
        assert "\n" not in problems(parts), name
        shown = any(isinstance(part, Panel) for part in parts)
        assert shown or name in ("rejections", "plan"), name


def test_a_segment_of_garbage_is_one_line(runs: Path, tmp_path: Path) -> None:
    """What a crash or another program left among the segments."""
    shutil.copytree(runs / "live-c", tmp_path / "whole")
    (tmp_path / "left" / "segments").mkdir(parents=True)
    (tmp_path / "left" / "segments" / "run.json").write_bytes(b"?")
    assert "broken JSON" in problems(page(tmp_path, "latency"))
    shutil.copy(runs / "live-d" / "run.json", tmp_path / "left" / "segments")
    (tmp_path / "left" / "segments" / "requests-0000001.arrow").write_bytes(b"?")
    for name in PAGES:
        assert "cannot be read" in problems(page(tmp_path, name)), name


def test_broken_spans_cost_one_page_a_line(runs: Path, tmp_path: Path) -> None:
    """They are read for one request at a time: all other pages are as before."""
    shutil.copytree(runs / "sim-d", tmp_path / "run")
    cut("spans.parquet")(tmp_path / "run")
    os.utime(tmp_path / "run" / "tbt.parquet")
    for name in PAGES:
        said = problems(page(tmp_path, name))
        assert said == "" or name == "request", name
        assert name != "request" or "spans.parquet: truncated or not Parquet" in said


def test_runs_of_earlier_versions_stand_beside_new_ones(runs: Path, tmp_path: Path) -> None:
    """Without later columns and tables: every page is there and says what is not recorded."""
    shutil.copytree(runs / "live-c", tmp_path / "new")
    shutil.copytree(runs / "live-d", tmp_path / "old")
    without("chunks.parquet", "reuse.parquet", "tbt.parquet")(tmp_path / "old")
    for table, later in (
        ("requests", ["class", "attempts", "retry_after_s", "transfer_start_s", "prefix_replicas"]),
        ("samples", ["evicted_blocks"]),
    ):
        path = tmp_path / "old" / f"{table}.parquet"
        pl.read_parquet(path).drop(later).write_parquet(path)
    for name in PAGES:
        parts = page(tmp_path, name)
        assert not problems(parts), name
        words = " ".join(part.text for part in parts if isinstance(part, Words))
        if name == "cache":
            for what in ("replicas of blocks", "evictions", "reuse distances"):
                assert f"2P+2D: no record of {what}." in words
    note = next(
        part.note
        for part in page(tmp_path, "request", "?run=old")
        if isinstance(part, Panel) and part.key == "request-first-token"
    )
    assert "No chunks of prefills are recorded in this run" in note
    assert "When its transfer began is not recorded" in note


@pytest.mark.parametrize("content", [b"?", b"{}", b"[]", b'{"spec": 1}', b"\xff"])
def test_a_broken_plan_is_one_line(tmp_path: Path, content: bytes) -> None:
    """With its place and what to do."""
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "plan.json").write_bytes(content)
    said = problems(page(tmp_path, "plan"))
    assert "plan.json: not a plan of this version" in said
    assert "make it anew" in said


def test_an_empty_run_is_said_to_be_empty(tmp_path: Path) -> None:
    """No request offered: every page opens and says so."""
    run = made_up_run(tmp_path / "full", requests=20)
    shutil.rmtree(tmp_path / "full")
    write_run(tmp_path / "empty", run.info, run.requests.clear(), run.spans.clear())
    for name in PAGES:
        parts = page(tmp_path, name)
        assert not problems(parts), name
        assert any(isinstance(part, Words) and "empty" in part.text for part in parts), name


def test_a_directory_without_runs_is_said_to_have_none(tmp_path: Path) -> None:
    """One line that names the directory."""
    assert f"{tmp_path}: neither a run directory nor one of runs" in problems(
        page(tmp_path, "overview")
    )


def test_a_run_of_before_the_table_of_gaps_opens_and_gets_one(runs: Path, tmp_path: Path) -> None:
    """tbt.parquet is made once, and says the same."""
    shutil.copytree(runs / "sim-d", tmp_path / "old")
    expected = pl.read_parquet(tmp_path / "old" / "tbt.parquet")
    (tmp_path / "old" / "tbt.parquet").unlink()
    assert not problems(page(tmp_path, "latency"))
    assert pl.read_parquet(tmp_path / "old" / "tbt.parquet").equals(expected)


# --- Through HTTP -------------------------------------------------------------------------------


def test_a_figure_s_data_is_exported_as_shown(runs: Path, serving: Serving) -> None:
    """CSV and Parquet hold the figure's frame, HTML is a page that loads nothing."""
    base = f"{serving(runs)}/export"
    query = "?runs=live-d,live-c&time=tbt_s&page=latency"
    csv = pl.read_csv(httpx.get(f"{base}/csv/latency-cumulative{query}").content)
    parquet = pl.read_parquet(
        io.BytesIO(httpx.get(f"{base}/parquet/latency-cumulative{query}").content)
    )
    run = read_run(runs / "live-d")
    expected = metrics.cumulative_shares(metrics.per_request(run.requests, run.spans), "tbt_s")
    for frame in (csv, parquet):
        own = frame.filter(run="live-d")
        assert own["value_s"].to_list() == pytest.approx(expected["value_s"].to_list())
    page_text = httpx.get(f"{base}/html/latency-cumulative{query}").text
    assert "TBT of the requests" in page_text
    assert "<script src=" not in page_text
    assert httpx.get(f"{base}/csv/no-such-figure{query}").status_code == 404


def test_a_stranger_s_host_name_is_refused(runs: Path, serving: Serving) -> None:
    """A page elsewhere whose name leads here cannot read the runs."""
    url = serving(runs)
    assert httpx.get(url, headers={"host": "evil.example"}).status_code == 403
    assert httpx.get(url).status_code == 200


def test_with_a_token_nobody_else_may_look(runs: Path, serving: Serving) -> None:
    """Pages and exports alike; the token in the address becomes a cookie and leaves it."""
    url = serving(runs, token="sesame")
    export = f"{url}/export/csv/latency-cumulative?page=latency"
    assert httpx.get(url).status_code == 403
    assert httpx.get(export).status_code == 403
    assert httpx.get(f"{url}/?token=wrong").status_code == 403
    with httpx.Client(follow_redirects=True) as client:
        answer = client.get(f"{url}/slo?token=sesame&ttft=3")
        assert str(answer.url) == f"{url}/slo?ttft=3"
        assert client.get(export).status_code == 200
