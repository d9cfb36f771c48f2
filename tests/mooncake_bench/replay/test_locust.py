"""Locust conducts the replay: every row sent once, every record at the master, honest exit codes.

Locust runs as its users run it, as a program; nothing of it is imported here.
"""

import contextlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from sse_server import Exchange, Server, good_stream, serving

from mooncake_bench.records import read_run

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform == "win32", reason="Locust's --processes needs fork"),
]
MODELS = {"/v1/models": {"data": [{"id": "small"}]}}
LOCUSTFILE = Path(__file__).parents[3] / "mooncake_bench" / "replay" / "locustfile.py"
ROWS = 40


def a_trace_file(directory: Path, gap_ms: int = 20) -> Path:
    rows = [
        {"timestamp": gap_ms * row, "input_length": 5, "output_length": 3, "hash_ids": [row]}
        for row in range(ROWS)
    ]
    path = directory / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def locust(*words: object, port: int | None = None):
    """A Locust process (and whatever it starts), ended at the latest with the block."""
    master = str(port or free_port())
    command = [sys.executable, "-m", "locust", "-f", LOCUSTFILE, *words]
    ports = ["--master-port", master]
    if "--worker" not in words:
        ports += ["--master-bind-host", "127.0.0.1", "--master-bind-port", master]
    process = subprocess.Popen(
        list(map(str, command + ports)),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    family = [psutil.Process(process.pid)]
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += family[0].children(recursive=True)
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.communicate()


def engines_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The engine processes under this Locust, and no others."""
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "mooncake_bench.replay.engine_process" in one.cmdline():
                found.append(one)
    return found


def wait_until(condition, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


def test_two_processes_send_every_row_once_and_all_records_reach_the_master(tmp_path):
    """One in four is refused with 429: counted, told to Locust apart, and the run stays green."""

    async def handler(exchange: Exchange) -> None:
        if exchange.number % 4 == 3:
            await exchange.plain(429, b"{}", b"X-Rejection-Reason: ttft", b"Retry-After: 1")
        else:
            await good_stream(exchange)

    out, report = tmp_path / "run", tmp_path / "locust"
    flags = ["--headless", "--processes", 2, "--out", out, "--json-file", report]
    with (
        serving(Server(handler, MODELS)) as server,
        locust(*flags, "--url", server.url, "--trace", a_trace_file(tmp_path)) as process,
    ):
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert sorted(server.received) == list(range(ROWS))
    run = read_run(out)
    assert run.requests["request"].to_list() == list(range(ROWS))
    assert (run.summary["finished"], run.summary["rejected"]) == (30, 10)
    assert run.summary["rejected_by_reason"] == {"ttft": 10}
    assert run.spans.height == 30 * 2
    assert run.info.client["engines"] == 2
    # Intended arrivals are those of the trace in both shares.
    assert run.requests["arrival_s"].to_list() == pytest.approx([0.02 * row for row in range(ROWS)])
    table = json.loads(report.with_suffix(".json").read_text())
    counts = {row["name"]: (row["num_requests"], row["num_failures"]) for row in table}
    assert counts == {"ttft": (30, 0), "request": (30, 0), "rejected": (10, 0)}


def test_a_lost_engine_is_told_and_its_rows_count_as_failed(tmp_path):
    """The other share goes on to its end; the run is not valid: exit code 3."""
    out = tmp_path / "run"
    flags = ["--headless", "--processes", 2, "--out", out, "--speed", 0.2]
    with (
        serving(Server(good_stream, MODELS)) as server,
        locust(*flags, "--url", server.url, "--trace", a_trace_file(tmp_path)) as process,
    ):
        wait_until(lambda: len(server.received) >= 6)
        engines = engines_of(process)
        assert len(engines) == 2
        engines[0].kill()
        _, log = process.communicate(timeout=60)
    assert process.returncode == 3, log
    run = read_run(out)
    assert run.requests.height == ROWS
    lost = run.requests.filter(run.requests["reason"] == "worker lost")
    assert len(set(lost["request"] % 2)) == 1  # all of one worker's share
    assert run.summary["finished"] == ROWS - lost.height
    assert "worker was lost" in run.info.invalid_reasons[0]


def test_a_master_with_its_own_workers_and_the_web_page(tmp_path):
    """Started from the page; /replay, figures and the tab tell how it goes; the results stay."""
    out, web, port = tmp_path / "run", free_port(), free_port()
    flags = ["--master", "--web-host", "127.0.0.1", "--web-port", web, "--out", out]
    page = httpx.Client(base_url=f"http://127.0.0.1:{web}", trust_env=False)

    def is_ready() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return page.get("/stats/requests").json()["workers"].__len__() == 2
        return False

    with (
        serving(Server(good_stream, MODELS)) as server,
        locust(*flags, "--url", server.url, "--trace", a_trace_file(tmp_path), port=port) as master,
        locust("--worker", port=port),
        locust("--worker", port=port),
    ):
        wait_until(is_ready)
        assert page.get("/replay").json()["phase"] == "idle"
        page.post("/swarm", data={"user_count": 1, "spawn_rate": 1, "speed": "2.0"})
        wait_until(lambda: page.get("/replay").json()["phase"] == "finished")
        shown = page.get("/replay").json()
        assert (shown["finished"], shown["workers_done"], shown["attainment"]) == (ROWS, 2, 1.0)
        stats = page.get("/stats/requests").json()
        rows = {row["figure"]: row["value"] for row in stats["extended_stats"][0]["data"]}
        assert rows["finished"] == str(ROWS)
        figures = page.get(rows["drawn"].removeprefix("at "), timeout=60.0)
        assert (figures.status_code, figures.text.count("<figure")) == (200, 4)
        assert master.poll() is None  # The page stays until somebody ends it.
    assert sorted(server.received) == list(range(ROWS))
    run = read_run(out)
    assert (run.summary["finished"], run.info.config["replay"]["speed"]) == (ROWS, 2.0)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    """An endpoint that is down: place and remedy, no traceback of ours, nothing written."""
    url = f"http://127.0.0.1:{free_port()}"
    out = tmp_path / "run"
    with locust(
        "--headless", "--url", url, "--trace", a_trace_file(tmp_path), "--out", out
    ) as process:
        _, log = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"{url}: nothing answers there (connection refused); start the server" in log
    assert "Traceback" not in log
    assert not out.exists()
