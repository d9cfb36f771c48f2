"""What a user of `gate`, `gate record` and `compare` sees: exit codes, files, one-line errors."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mooncake_bench.records import Run, write_run

MakeRun = Callable[..., Run]
SCENARIO = """[[scenario]]
name = "small"
trace = "conversation-like:duration_s=60,rate_rps=2"
seed = 1
[scenario.cluster]
prefill_instances = 2
decode_instances = 2
"""
POLICY = """[[metric]]
name = "ttft_s.p50"
"""


def run(
    *arguments: object, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mooncake_bench.cli", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "150", **env}
    environment.pop("GITHUB_STEP_SUMMARY", None) if "GITHUB_STEP_SUMMARY" not in env else None
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd, env=environment
    )


def assert_one_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def live(a_run: MakeRun) -> Callable[..., list[Path]]:
    """`live("slow", 5, slow=2.0)`: so many live runs of one trace, a seed of noise each."""

    def make(name: str, count: int, **options: object) -> list[Path]:
        found = []
        for number in range(count):
            made = a_run(
                f"{name}-{number}",
                source="external",
                system="external",
                requests=60,
                seed=number + 100 * len(name),
                **options,
            )
            # The made-up noise has a seed of its own; the runs' stays.
            made.info.seed = 0
            made.info.trace["transforms"] = []
            write_run(made.directory or Path(), made.info, made.requests, made.spans)
            found.append(made.directory or Path())
        return found

    return make


def test_a_slower_candidate_ends_with_99_and_says_why(live, tmp_path: Path) -> None:
    """Table, reason and command on stdout; every file; the job page of GitHub."""
    policy = tmp_path / "gate.toml"
    policy.write_text(POLICY)
    page = tmp_path / "step.md"
    done = run(
        "gate", "--baseline", *live("a", 5), "--candidate", *live("bb", 5, slow=6.0),
        "--policy", policy, "--out", tmp_path / "out", "--series", tmp_path / "series.csv",
        GITHUB_STEP_SUMMARY=str(page),
    )  # fmt: skip  # one line a word would be a page
    assert done.returncode == 99, done.stdout + done.stderr
    assert "BREACHED" in done.stdout
    assert "mooncake-bench compare" in done.stdout
    assert "Breached" in page.read_text()
    out = tmp_path / "out"
    verdict = json.loads((out / "verdict.json").read_text())
    assert (verdict["outcome"], verdict["exit_code"]) == ("breached", 99)
    suite = ElementTree.parse(out / "junit.xml").getroot()[0]
    assert suite.attrib == {"name": "live", "tests": "1", "failures": "1", "errors": "0"}
    smaller = json.loads((out / "github-smaller-is-better.json").read_text())
    assert [one["name"] for one in smaller] == ["ttft_s.p50"]
    assert json.loads((out / "bencher.json").read_text())["live"]["ttft_s.p50"]["value"] > 0
    assert "</html>" in (out / "report.html").read_text()
    rows = list(csv.DictReader((tmp_path / "series.csv").open()))
    assert len(rows) == 1
    assert float(rows[0]["ttft_s.p50"]) > 0


def test_what_differs_is_refused_unless_forced(live, tmp_path: Path) -> None:
    """Another trace: exit 3 and one line; --allow trace compares all the same."""
    a, b = live("a", 5), live("bb", 5, trace_name="other")
    for path in b:
        text = (path / "run.json").read_text().replace("5d1c5d1c", "00005d1c")
        (path / "run.json").write_text(text)
    sides = ("--baseline", *a, "--candidate", *b)
    assert_one_line(run("gate", *sides), 3, "other traces", "--allow trace")
    assert run("gate", *sides, "--allow", "trace").returncode in (0, 4, 99)


def test_too_few_runs_are_invalid(live) -> None:
    """Two against two can never be significant."""
    done = run("gate", "--baseline", *live("a", 2), "--candidate", *live("bb", 2))
    assert_one_line(done, 3, "can never be significant", "at least")


@pytest.mark.parametrize("broken", ["truncated", "missing", "empty", "metric", "versions", "newer"])
def test_broken_input_is_one_line_and_exit_2(live, tmp_path: Path, broken: str) -> None:
    """The place and the remedy, whatever is wrong."""
    a, b = live("a", 5), live("bb", 5)
    words = {
        "truncated": ("requests.parquet", "truncated"),
        "missing": ("nowhere", "no such directory"),
        "empty": ("no request was offered",),
        "metric": ("ttft_s.p5x", "did you mean", "ttft_s.p"),
        "versions": ("mixed versions", "0.0.1"),
        "newer": ("schema version 99", "upgrade"),
    }
    policy = tmp_path / "gate.toml"
    policy.write_text(POLICY.replace("p50", "p5x") if broken == "metric" else POLICY)
    if broken == "truncated":
        path = a[1] / "requests.parquet"
        path.write_bytes(path.read_bytes()[:500])
    elif broken == "missing":
        a = [tmp_path / "nowhere"]
    elif broken == "empty":
        info = json.loads((b[0] / "run.json").read_text())
        (b[0] / "run.json").write_text(json.dumps(info | {"measured_s": [1e6, 2e6]}))
    elif broken == "versions":
        info = json.loads((a[1] / "run.json").read_text())
        (a[1] / "run.json").write_text(json.dumps(info | {"versions": {"mooncake-bench": "0.0.1"}}))
    elif broken == "newer":
        info = json.loads((a[1] / "run.json").read_text())
        (a[1] / "run.json").write_text(json.dumps(info | {"schema_version": 99}))
    done = run("gate", "--baseline", *a, "--candidate", *b, "--policy", policy)
    assert_one_line(done, 2, *words[broken])


def test_scenarios_are_recorded_compared_and_moved_on_purpose(tmp_path: Path) -> None:
    """As it was: 0. Another cluster: 3, record again. Not recorded: 2."""
    scenarios, golden = tmp_path / "scenarios.toml", tmp_path / "golden"
    scenarios.write_text(SCENARIO)
    gate = ("gate", "--scenarios", scenarios, "--baseline", golden)
    assert_one_line(run(*gate), 2, "gate record --scenarios")
    done = run("gate", "record", "--scenarios", scenarios, "--to", golden)
    assert done.returncode == 0, done.stderr
    assert run(*gate).returncode == 0
    scenarios.write_text(SCENARIO.replace("decode_instances = 2", "decode_instances = 3"))
    assert_one_line(run(*gate), 3, "small", "record it again")
    done = run("gate", "record", "--scenarios", scenarios, "--to", golden)
    assert "BREACHED" in done.stdout  # What moves is shown, old and new.
    assert run(*gate).returncode == 0


def test_a_change_of_behaviour_is_found_with_its_first_request(tmp_path: Path) -> None:
    """The same scenario on other decisions: 99, and the first request that went elsewhere."""
    scenarios, golden = tmp_path / "scenarios.toml", tmp_path / "golden"
    scenarios.write_text(SCENARIO)
    run("gate", "record", "--scenarios", scenarios, "--to", golden)
    baseline = golden / "baseline.json"
    was = json.loads(baseline.read_text())
    was["scenarios"][0]["numbers"]["ttft_s.mean"] *= 1.000001
    baseline.write_text(json.dumps(was))
    done = run("gate", "--scenarios", scenarios, "--baseline", golden)
    assert done.returncode == 99
    assert "ttft_s.mean" in done.stdout
    assert "gate record" in done.stdout


def test_simulated_runs_are_compared_exactly(tmp_path: Path) -> None:
    """The same twice passes; another scheduler does not, and compare tells the first decision."""
    trace = ("simulate", "--trace", "conversation-like:duration_s=60,rate_rps=3", "--prefill", "3")
    for name, policy in (("a", "kvcache-centric"), ("b", "kvcache-centric"), ("c", "least-loaded")):
        done = run(*trace, "--decode", "2", "--scheduling", policy, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    a, b, c = (tmp_path / name for name in "abc")
    assert run("gate", "--baseline", a, "--candidate", b).returncode == 0
    done = run("gate", "--baseline", a, "--candidate", c)
    assert done.returncode == 99
    assert "decided otherwise; the first: request" in done.stdout
    policy = tmp_path / "gate.toml"
    policy.write_text(
        '[exact]\nchanges = "observe"\n[[threshold]]\nrule = "finished >= baseline"\n'
    )
    assert run("gate", "--baseline", a, "--candidate", c, "--policy", policy).returncode == 0
    assert "decided otherwise; request" in run("compare", a, c).stdout


def test_a_branch_of_git_keeps_a_baseline(live, tmp_path: Path) -> None:
    """Recorded twice, read back from the branch; the working tree has nothing of it."""
    tree = tmp_path / "tree"
    tree.mkdir()
    subprocess.run(["git", "init", "-q", tree], check=True)
    a = live("a", 5)
    for _ in range(2):
        done = run("gate", "record", *a, "--to", "git:perf-baselines:main", cwd=tree)
        assert done.returncode == 0, done.stderr
        assert "run to run" in done.stdout
    assert [path.name for path in tree.iterdir()] == [".git"]
    log = subprocess.run(
        ["git", "log", "--oneline", "perf-baselines"], cwd=tree, capture_output=True, check=True
    )
    assert len(log.stdout.splitlines()) == 2
    done = run("gate", "--baseline", "git:perf-baselines:main", "--candidate", *a, cwd=tree)
    assert done.returncode in (0, 4), done.stderr
    assert "5 live runs" in done.stdout


def test_doubt_is_repeated_by_the_commands_of_the_policy(live, tmp_path: Path) -> None:
    """What seemed slower is run again, both sides in turn, and passes when it is not."""
    a, slow = live("a", 5), live("bb", 5, slow=6.0)
    copy = f'{sys.executable} -c "import shutil, sys; shutil.copytree(*sys.argv[1:])"'
    policy = tmp_path / "gate.toml"
    same = str(a[0]).removesuffix("0")
    policy.write_text(
        "[runs]\nrepeats = 5\n"
        + "".join(f"{side} = '''{copy} {same}0 {{out}}'''\n" for side in ("baseline", "candidate"))
        + POLICY
    )
    done = run(
        "gate",
        "--baseline",
        *a,
        "--candidate",
        *slow,
        "--policy",
        policy,
        "--out",
        tmp_path / "out",
    )
    assert "In doubt and repeated" in done.stdout, done.stdout + done.stderr
    assert done.returncode in (0, 4)
    made = sorted(path.name for path in (tmp_path / "out" / "runs").iterdir() if path.is_dir())
    assert len(made) == 10
    assert made[0] == "second-baseline-1"


def test_a_command_that_fails_is_named(tmp_path: Path) -> None:
    """Its side, its exit code, and where its words are."""
    policy = tmp_path / "gate.toml"
    policy.write_text("[runs]\nbaseline = 'false {out}'\ncandidate = 'true {out}'\n" + POLICY)
    done = run("gate", "--policy", policy, "--out", tmp_path / "out")
    assert_one_line(done, 2, "baseline", "exit code 1", ".log")
    policy.write_text("[runs]\nbaseline = 'true'\ncandidate = 'true'\n" + POLICY)
    assert_one_line(run("gate", "--policy", policy), 2, "{out}")
