"""`plan` from its TOML to the page: the answer, the resume, what is infeasible or impossible."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mooncake_bench.plan.candidate import Job, Trial
from mooncake_bench.plan.errors import PlanError
from mooncake_bench.plan.main import studied_plan
from mooncake_bench.plan.outcome import Outcome
from mooncake_bench.plan.page import write_page
from mooncake_bench.plan.pools import run
from mooncake_bench.plan.result import PlanReport

REPO = Path(__file__).resolve().parents[2]
PLAN = """
trace = "poisson-16k:rate_rps=2,duration_s=60"
growth = [1, 2]
verify_seeds = 2
[slo]
ttft_s = 3
tbt_s = 0.1
[[profiles]]
profile = "h100-llama3-70b"
price_per_gpu_hour = 2
[limits]
nodes = {nodes}
[search]
nodes_per_group = [1]
"""


class ThreadPool:
    """Runs trials in this process, one after another, beside the plan's own event loop."""

    def __init__(self) -> None:
        self.ran = 0
        self.executor = ThreadPoolExecutor(1)

    def submit(self, job: Job) -> Future[Outcome]:
        self.ran += 1
        return self.executor.submit(run, job)

    def close(self) -> None:
        self.executor.shutdown()


def nobody(trial: Trial, outcome: Outcome, is_new: bool) -> None:
    pass


def planned(directory: Path, text: str, pool: ThreadPool | None = None) -> PlanReport:
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "plan.toml"
    config.write_text(text)
    return studied_plan(config, directory / "out", pool or ThreadPool(), nobody)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[PlanReport, Path]:
    directory = tmp_path_factory.mktemp("plan")
    return planned(directory, PLAN.format(nodes=24)), directory


def test_the_plan_holds_and_one_node_less_does_not(report: tuple[PlanReport, Path]):
    """At every growth, over the seeds; the bound is below it, the capacity above the load."""
    for one in report[0].growths:
        assert one.choice is not None
        assert one.choice.attainment.value >= 0.95
        assert len(one.choice.verified) == 2
        assert one.choice.nodes >= one.offers[0].bound.nodes
        assert one.capacity_rps is not None
        assert one.capacity_rps.value >= one.rate_rps
        held = [tried for tried in one.tried if tried.is_adopted]
        assert all(tried.attainment >= 0.95 for tried in held)
    first, second = report[0].growths
    assert first.choice.nodes <= second.choice.nodes
    assert second.rate_rps == pytest.approx(2 * first.rate_rps)


def test_the_details_tell_of_everything(report: tuple[PlanReport, Path]):
    """Splits, sizes, circumstances and overload, each at the first growth."""
    details = report[0].details
    assert details is not None
    assert {one.axis for one in details.sensitivity} >= {"link", "cache", "prefixes", "reports"}
    assert {one.admission for one in details.overload} >= {"accept-all", "early-rejection"}
    assert {one.system for one in details.curve} == {"disaggregated", "colocated"}
    assert any(cell.attainment >= 0.95 for cell in details.heat)


def test_the_page_and_the_json_say_the_same(report: tuple[PlanReport, Path]):
    """One page that loads nothing, and data that reads back as what was found."""
    found, directory = report
    again = msgspec.json.decode((directory / "out" / "plan.json").read_bytes(), type=PlanReport)
    assert again == found
    html = (directory / "out" / "plan.html").read_text()
    assert found.growths[0].choice is not None
    assert found.growths[0].choice.title in html
    without_plotly = re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    assert not re.search(r'(src|href)="(http|//)', without_plotly)


def test_nothing_is_run_twice(report: tuple[PlanReport, Path]):
    """The same plan in the same directory answers from its files, with the same answer."""
    found, directory = report
    pool = ThreadPool()
    again = planned(directory, PLAN.format(nodes=24), pool)
    assert pool.ran == 0
    assert again.growths == found.growths
    assert again.details == found.details


def test_too_few_nodes_is_a_result(tmp_path: Path):
    """It names the limit that binds; the page is written all the same."""
    found = planned(tmp_path, PLAN.format(nodes=2).replace("[1, 2]", "[4]"))
    one = found.growths[0]
    assert one.choice is None
    assert "limits.nodes is 2" in one.infeasible
    assert "limits.nodes is 2" in (tmp_path / "out" / "plan.html").read_text()


def test_an_impossible_promise_is_one_line(tmp_path: Path):
    """No number of nodes makes one prefill shorter."""
    text = PLAN.format(nodes=24).replace("ttft_s = 3", "ttft_s = 0.01")
    with pytest.raises(PlanError, match="even an idle node") as raised:
        planned(tmp_path, text)
    assert "\n" not in str(raised.value)


def test_a_report_of_nothing_is_a_page(report: tuple[PlanReport, Path], tmp_path: Path):
    """Without any feasible growth there is nothing to draw, and something to say."""
    found = msgspec.structs.replace(report[0], growths=(), details=None)
    write_page(found, tmp_path / "plan.html")
    assert "No cluster within the limits" in (tmp_path / "plan.html").read_text()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_every_figure_fits(report: tuple[PlanReport, Path], chromium: Any, width: int):
    """No console error, no request but the file, no sideways scrolling, every figure drawn."""
    file = report[1] / "out" / "plan.html"
    page = chromium.new_page(viewport={"width": width, "height": 900})
    errors: list[str] = []
    asked: list[str] = []
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    figures = ["capacity", "splits", "overload"]
    figures += [f"if-{axis}" for axis in ("growth", "prefixes", "cache", "link", "reports")]
    for name in figures:
        page.wait_for_selector(f"#{name} svg.main-svg")
        box = page.locator(f"#{name} svg.main-svg").first.bounding_box()
        assert box["x"] + box["width"] <= width, name
    assert page.locator(".js-plotly-plot").count() == len(figures)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert errors == []
    assert asked == [file.as_uri()]


# ---- from the command line -----------------------------------------------------------------------


def command(directory: Path, *more: str) -> list[str]:
    words = ["plan", "--config", str(directory / "plan.toml"), "--out", str(directory / "out")]
    return [sys.executable, "-m", "mooncake_bench.cli", *words, *more]


def wait_for(condition: Callable[[], bool], most_s: float = 60.0) -> None:
    end_s = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.05)


def test_a_killed_plan_goes_on_where_it_was(tmp_path: Path):
    """SIGKILL takes the workers along; what was finished is not run again."""
    (tmp_path / "plan.toml").write_text(PLAN.format(nodes=24))
    trials = tmp_path / "out" / "trials"
    killed = subprocess.Popen(
        command(tmp_path, "--workers", "2"), cwd=REPO, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: len(list(trials.glob("*.json"))) >= 5)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    kept = {path: path.stat().st_mtime_ns for path in trials.glob("*.json")}
    done = subprocess.run(
        command(tmp_path, "--workers", "2"), cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # Asked for whole, a run that was stopped early is run again; nothing else is.
    data: dict[str, Any] = json.loads((tmp_path / "out" / "plan.json").read_text())
    again = [path for path, stamp in kept.items() if path.stat().st_mtime_ns != stamp]
    assert data["counts"]["reused"] >= len(kept) - len(again) >= 1
    for path in again:
        assert json.loads(path.read_text())["outcome"]["is_stopped"] is False


def test_bad_input_is_exit_code_2(tmp_path: Path):
    """One line, without a traceback."""
    (tmp_path / "plan.toml").write_text(PLAN.format(nodes=0))
    done = subprocess.run(command(tmp_path), cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "limits.nodes is 0" in done.stderr


def test_ray_is_an_extra(tmp_path: Path):
    """Without it --ray says what to install."""
    if find_spec("ray"):
        pytest.skip("Ray is installed here")
    (tmp_path / "plan.toml").write_text(PLAN.format(nodes=4))
    done = subprocess.run(
        command(tmp_path, "--ray", "local"), cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "[ray]" in done.stderr


def test_a_fit_tells_how_good_it_is(tmp_path: Path):
    """The file is a trace for every verb; beside it stands what differs, simulated goodput too."""
    out = tmp_path / "mine.toml"
    words = ["trace", "fit", "conversation-like:duration_s=300", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "mooncake_bench.cli", *words],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "prefix hits, endless cache" in done.stdout
    found = json.loads((tmp_path / "mine.quality.json").read_text())
    assert any("goodput" in one["what"] for one in found)
    plan = PLAN.format(nodes=24).replace("poisson-16k:rate_rps=2,duration_s=60", "mine.toml")
    report = planned(tmp_path, plan.replace("[1, 2]", "[1]").replace("ttft_s = 3", "ttft_s = 20"))
    assert report.trace["name"] == "mine"
