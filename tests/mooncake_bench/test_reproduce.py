"""`reproduce`: plans, the runner that keeps what is finished, judgements, and the page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mooncake_bench.reproduce.catalogue import EXPERIMENTS, chosen
from mooncake_bench.reproduce.errors import ReproduceError
from mooncake_bench.reproduce.experiment import published
from mooncake_bench.reproduce.experiments.arxiv_admission import correlation
from mooncake_bench.reproduce.experiments.arxiv_end_to_end import highest
from mooncake_bench.reproduce.experiments.fast25_end_to_end import judge_fig1
from mooncake_bench.reproduce.experiments.settings import CONVERSATION, SYSTEMS
from mooncake_bench.reproduce.main import planned, reproduce
from mooncake_bench.reproduce.outcome import between, largest_error, number, share
from mooncake_bench.reproduce.plan import ClusterRun, Job, PoolRun, Sources, Workload
from mooncake_bench.reproduce.progress import Progress
from mooncake_bench.reproduce.runner import load_results, path_of, run_all
from mooncake_bench.reproduce.work import adjusted, box, do
from reference_cluster.cost_model import load_profile

REPO = Path(__file__).resolve().parents[2]
SMALL = Workload("poisson-16k:rate_rps=0.2,duration_s=100")
TWO_NODES = {"prefill_instances": 1, "decode_instances": 1}
NOWHERE = Sources(None)

# Every figure that the papers are compared in.
FIGURES = {
    *(f"fast25-fig{n}" for n in (1, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15)),
    *(f"arxiv-fig{n}" for n in (7, 8, 11, 12, 13)),
    *("arxiv-table1", "arxiv-table3", "arxiv-fig9-10", "ablations"),
}


def a_job(seed: int = 0, **changes: Any) -> Job:
    return NOWHERE.job(ClusterRun(SMALL, {**TWO_NODES, "seed": seed}, **changes))


def test_all_figures_are_there():
    """Each figure has an experiment, and whatever is published says where it was read."""
    assert set(EXPERIMENTS) == FIGURES
    assert published().keys() <= FIGURES
    assert all(len(one["source"]) > 20 for one in published().values())


def test_the_published_numbers_are_the_papers():
    """A few that can be looked up in the papers."""
    numbers = published()
    assert numbers["fast25-fig5"]["random"]["mean"] == 19.65
    assert dict(numbers["fast25-fig1"]["vllm"])[100] == 16.145
    assert dict(numbers["arxiv-table1"]["lfu"])[30_000] == 0.43
    assert numbers["arxiv-table3"]["predictive"] == 3589
    assert numbers["arxiv-fig11"]["leval"]["within"]["2P+2D"] == [1.0, 1.75]


# ---- plans -------------------------------------------------------------------------------------


def test_a_digest_means_the_whole_run():
    """Equal descriptions have equal digests; any difference makes another."""
    assert a_job().digest == a_job().digest
    others = [
        a_job(seed=1),
        a_job(speed=2.0),
        a_job(profile={"decode.base_s": 0.05}),
        a_job(is_with_gaps=True),
        NOWHERE.job(PoolRun(SMALL)),
    ]
    assert len({a_job().digest, *(job.digest for job in others)}) == 1 + len(others)


def test_a_file_counts_by_its_content(tmp_path: Path):
    """The same trace elsewhere is the same run; another content is not."""
    workload = Workload("conversation-like", "conversation_trace.jsonl")
    digests = []
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        directory = tmp_path / name
        directory.mkdir()
        (directory / workload.file).write_text(text)
        digests.append(Sources(directory).job(PoolRun(workload)).digest)
    assert digests[0] == digests[1] != digests[2]


def test_figures_share_their_runs():
    """Figures 1 and 8 of FAST'25 look at the same four runs."""
    jobs, _ = planned(chosen(["fast25-fig1", "fast25-fig8"]), NOWHERE)
    assert len(jobs) == len(SYSTEMS)


def test_a_stand_in_is_said():
    """Without its file a workload is a generator, and its words say so."""
    words = NOWHERE.says(CONVERSATION)
    assert "standing in for conversation_trace.jsonl" in words
    assert NOWHERE.source(CONVERSATION) == CONVERSATION.generator


def test_a_profile_is_adjusted_by_dotted_names():
    """One number is replaced, the rest stays."""
    profile = load_profile("a800-llama3-70b")
    slower = adjusted(profile, {"decode.base_s": 0.05})
    assert slower.decode.base_s == 0.05
    assert slower.decode.sequence_s == profile.decode.sequence_s
    assert slower.prefill == profile.prefill


def test_an_unknown_figure_names_its_neighbours():
    """A typo is answered with what may have been meant."""
    with pytest.raises(ReproduceError, match="fast25-fig11"):
        chosen(["fast25-fig111"])


# ---- running -----------------------------------------------------------------------------------


def test_results_are_kept_and_not_made_again(tmp_path: Path):
    """Runs in worker processes leave what the run itself gives; a broken file counts as missing."""
    jobs = [a_job(), a_job(seed=1)]
    run_all(jobs, tmp_path, 1, lambda job, result: None)
    kept = load_results(tmp_path, jobs)
    assert kept.keys() == {job.digest for job in jobs}
    # Through JSON, as the kept ones were.
    assert kept[jobs[0].digest]["values"] == json.loads(json.dumps(do(jobs[0])["values"]))
    assert all(result["cpu_s"] > 0 for result in kept.values())
    path_of(tmp_path, jobs[1]).write_text('{"cpu_s": 1, "val')
    assert load_results(tmp_path, jobs).keys() == {jobs[0].digest}


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path):
    """Ctrl-C after the first of many: at least that one is there, not all are, no half file is."""
    jobs = [a_job(seed=seed) for seed in range(40)]

    def interrupt(job: Job, result: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(jobs, tmp_path, 1, interrupt)
    kept = load_results(tmp_path, jobs)
    assert 1 <= len(kept) < len(jobs)
    assert len(list(tmp_path.iterdir())) == len(kept)


def test_nothing_is_run_twice(tmp_path: Path):
    """A second call finds the runs of the first; the page and the JSON are written each time."""
    name = "arxiv-fig7"  # Twenty requests in all.
    seen: list[list[Progress]] = [[], []]
    for progress in seen:
        reproduce([name], None, tmp_path, 1, progress.append)
    first, second = seen
    assert all(one.is_new for one in first)
    assert not any(one.is_new for one in second)
    assert len(first) == len(second) == first[-1].total == len(EXPERIMENTS[name].runs)
    data = json.loads((tmp_path / "reproduce.json").read_text())
    assert [figure["name"] for figure in data["figures"]] == [name]
    assert len(data["figures"][0]["runs"]) == first[-1].total


def test_the_page_is_self_contained(tmp_path: Path):
    """It loads nothing, and holds the figure with its source and its verdict."""
    reproduce(["fast25-fig14"], None, tmp_path, 1, lambda progress: None)
    html = (tmp_path / "reproduce.html").read_text()
    body = html[html.index("<body>") :]
    assert not re.search(r'(src|href)="(?!#|data:)', body)
    assert "20 of 20 within bounds" in body
    assert "digitised from FAST&#x27;25 Figure 14" in body


def test_an_unwritable_place_is_said(tmp_path: Path):
    """One line with the place and what to do."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ReproduceError, match="--out"):
        reproduce(["fast25-fig14"], None, tmp_path / "file", 1, lambda progress: None)


def test_the_command_names_a_wrong_figure(tmp_path: Path):
    """Exit code 2 and one line."""
    command = [sys.executable, "-m", "mooncake_bench.cli", "reproduce", "fig1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "fast25-fig1" in done.stderr
    assert not list(tmp_path.iterdir())


# ---- judging -----------------------------------------------------------------------------------


def test_bounds_hold_up_to_their_edge():
    """Shares are compared in points, numbers relatively, ranges as they are."""
    assert share("x", 0.50, 0.55, within=0.06).is_met
    assert not share("x", 0.50, 0.57, within=0.06).is_met
    assert number("x", 10.0, 10.9, within=0.1).is_met
    assert not number("x", 10.0, 11.1, within=0.1).is_met
    assert between("x", 1.17, 1.05, 1.05, 1.35).is_met
    assert not between("x", 1.17, 1.36, 1.05, 1.35).is_met
    assert number("x", None, 3.0).is_met is None


def test_the_largest_error_is_named():
    """Of each kind, whatever its sign."""
    checks = [share("a", 0.5, 0.47), share("b", 0.5, 0.51), number("c", 2.0, 1.0)]
    assert largest_error(checks) == "3.0 points, 50%"
    assert largest_error([number("c", None, 1.0)]) == ""


def as_published(system: str, shift: float = 0.0) -> dict[str, Any]:
    """A run of F Figure 1 that gives the paper's own shares, all of them `shift` higher."""
    theirs = published()["fast25-fig1"][system]
    return {"tbt_within": [[ms / 1e3, y / 100 + shift] for ms, y in theirs] + [[0.3, 1.0]]}


def test_figure_1_is_judged_by_points():
    """The paper's own curves pass every bound; a system 7 points off misses its three."""
    theirs = published()["fast25-fig1"]
    values = {system: as_published(system) for system in SYSTEMS}
    for system in set(SYSTEMS) - {"mooncake"}:
        values[system]["tbt_within"] = values[system]["tbt_within"][:-1]
    outcome = judge_fig1(values, theirs)
    assert all(check.is_met in (True, None) for check in outcome.checks)
    values["vllm"]["tbt_within"] = [[x, y + 0.07] for x, y in values["vllm"]["tbt_within"]]
    missed = [c.what for c in judge_fig1(values, theirs).checks if c.is_met is False]
    assert missed == [f"vLLM, TBT below {ms} ms" for ms in (100, 200, 300)]


def test_the_highest_rate_is_before_the_first_miss():
    """A lucky point above a rate that failed does not count."""
    assert highest([(1.0, 0.1), (2.0, 0.9), (3.0, 1.1), (4.0, 0.8)]) == 2.0
    assert highest([(1.0, 1.1)]) == 0.0


def test_loads_in_anti_phase_correlate_negatively():
    """Pearson's coefficient: -1, 1, and 0 for a line."""
    assert correlation([0, 1, 0, 1], [1, 0, 1, 0]) == pytest.approx(-1)
    assert correlation([0, 1, 2], [1, 3, 5]) == pytest.approx(1)
    assert correlation([1, 1, 1], [1, 2, 3]) == 0


def test_a_box_stops_at_one_and_a_half_quartile_ranges():
    """0..100 and one far away: the far one is no whisker."""
    import numpy as np

    assert box(np.array([*map(float, range(101)), 1e6])) == pytest.approx(
        [0, 25.25, 50.5, 75.75, 100]
    )


# ---- the real trace ----------------------------------------------------------------------------


def traces() -> Path:
    directory = Path(os.environ.get("MOONCAKE_TRACES", REPO / ".." / "shared" / "traces"))
    if not (directory / CONVERSATION.file).is_file():
        pytest.skip(f"{CONVERSATION.file} is not here: set MOONCAKE_TRACES to its directory")
    return directory


def missed(names: list[str], out: Path) -> list[str]:
    findings = reproduce(names, traces(), out, 2, lambda progress: None)
    assert not any("standing in" in words for one in findings for words in one.workloads)
    return [check.what for one in findings for check in one.bound if not check.is_met]


def test_hit_ratios_of_the_real_trace(tmp_path: Path):
    """F Figure 9: an LRU pool finds what was counted independently, within .005."""
    assert missed(["fast25-fig9"], tmp_path) == []


@pytest.mark.bench
def test_the_papers_figures_on_the_real_trace(tmp_path: Path):
    """F Figures 1, 5, 8 and 10 within all bounds."""
    assert missed(["fast25-fig1", "fast25-fig5", "fast25-fig8", "fast25-fig10"], tmp_path) == []


def test_json_of_a_plan_reads_back():
    """What is kept beside a result is the plan, and can be run again."""
    plan = a_job().plan
    assert msgspec.convert(msgspec.to_builtins(plan), type(plan)) == plan
