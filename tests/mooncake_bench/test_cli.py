"""What a user types: the verbs, and one line with place, remedy and exit 2 for bad input."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mooncake_bench.records import read_run

GOOD_ROW = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mooncake_bench.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def a_trace(path: Path, *rows: dict[str, object]) -> Path:
    # json writes NaN as NaN, which is what broken producers do too.
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_one_line_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"timestamp": 1, "input_length": 600, "hash_ids": [0, 1]}, ("output_length",)),
        ({**GOOD_ROW, "timestamp": -5}, ("timestamp", "-5")),
        ({**GOOD_ROW, "timestamp": float("nan")}, ("NaN",)),
        ({**GOOD_ROW, "hash_ids": [0]}, ("hash_ids", "2")),
        ({**GOOD_ROW, "input_length": 0, "hash_ids": []}, ("input_length",)),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, row: dict[str, object], words: tuple[str, ...]):
    """The file, the row and the field are in the one line; nothing was simulated."""
    trace = a_trace(tmp_path / "broken.jsonl", GOOD_ROW, row)
    done = run("simulate", "--trace", trace, "--out", tmp_path / "run")
    assert_one_line_error(done, "broken.jsonl", "2", *words)
    assert not (tmp_path / "run").exists()


def test_an_unknown_config_key_names_its_neighbours(tmp_path: Path):
    """A typo is answered with what may have been meant."""
    config = tmp_path / "cluster.toml"
    config.write_text('[conductor]\nshceduling = "random"\n')
    trace = a_trace(tmp_path / "good.jsonl", GOOD_ROW)
    done = run("simulate", "--trace", trace, "--config", config, "--out", tmp_path / "run")
    assert_one_line_error(done, "cluster.toml", "shceduling", "scheduling")


def test_a_profile_that_does_not_exist(tmp_path: Path):
    """The known profiles are listed."""
    trace = a_trace(tmp_path / "good.jsonl", GOOD_ROW)
    done = run("simulate", "--trace", trace, "--profile", "b900", "--out", tmp_path / "run")
    assert_one_line_error(done, "b900", "a800-llama3-70b")


def test_a_trace_that_does_not_exist(tmp_path: Path):
    """Neither a file nor a generator."""
    done = run("simulate", "--trace", "conversation-lke", "--out", tmp_path / "run")
    assert_one_line_error(done, "conversation-lke", "conversation-like")


def test_a_port_in_use():
    """Says which, and what to do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("serve", "--port", str(port))
    assert_one_line_error(done, str(port), "--port")


def test_others_may_not_reach_an_unprotected_server():
    """Listening beyond this machine needs a token."""
    assert_one_line_error(run("serve", "--host", "0.0.0.0", "--port", "0"), "--token")


def test_an_endpoint_that_is_down(tmp_path: Path):
    """Nothing listens: said before anything is replayed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    trace = a_trace(tmp_path / "good.jsonl", GOOD_ROW)
    done = run("replay", "--url", url, "--trace", trace, "--out", tmp_path / "run")
    assert_one_line_error(done, url)


def test_a_report_of_nothing(tmp_path: Path):
    """A directory that is no run."""
    assert_one_line_error(run("report", tmp_path), "run.json")


def test_a_truncated_result_is_named(tmp_path: Path):
    """Half a Parquet file is not read as less data."""
    trace = a_trace(tmp_path / "good.jsonl", GOOD_ROW)
    assert run("simulate", "--trace", trace, "--out", tmp_path / "run").returncode == 0
    spans = tmp_path / "run" / "spans.parquet"
    spans.write_bytes(spans.read_bytes()[:100])
    done = run("report", tmp_path / "run", "--out", tmp_path / "report.html")
    assert_one_line_error(done, "spans.parquet")


def test_simulate_writes_a_whole_run_and_report_shows_it(tmp_path: Path):
    """Every offered request is in the results, also one that no instance could ever hold."""
    rows: list[dict[str, object]] = [
        {**GOOD_ROW, "output_length": 1},
        *({**GOOD_ROW, "hash_ids": [0, 10 + one]} for one in range(28)),
        {**GOOD_ROW, "input_length": 126_000, "hash_ids": list(range(100, 347))},
        {**GOOD_ROW, "input_length": 2_000_000, "hash_ids": list(range(1000, 4907))},
    ]
    trace = a_trace(tmp_path / "edges.jsonl", *rows)
    for name, system in (("split", "disaggregated"), ("whole", "colocated")):
        done = run("simulate", "--trace", trace, "--system", system, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        summary = read_run(tmp_path / name).summary
        assert summary["offered"] == 31
        assert summary["finished"] == 30
        assert summary["rejected_by_reason"] == {"too-large": 1}
    page = tmp_path / "report.html"
    done = run("report", tmp_path / "split", tmp_path / "whole", "--out", page)
    assert done.returncode == 0, done.stderr
    assert "</html>" in page.read_text()
