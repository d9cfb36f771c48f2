"""How far is the page behind a Locust run, and what does the run pay? live.py [SECONDS] [--check].

A live 2P+2D, a Locust replay against it, the dashboard and a browser that watches the overview.
Each time the page says that N requests have ended, the run's own records say since when the
(N + 1)th had ended: that is how far the page is behind. The cost is the CPU time of handing over
the run's records, of writing them as segments and of asking for the cluster's samples: all of it
once more, at the run's own pace. `--check` ends with 1 where the page was more than 2 s behind, the
cost more than 3 % of a core, or a killed run without a word that it is incomplete.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from playwright.sync_api import sync_playwright

from mooncake_bench import metrics
from mooncake_bench.demo import LOCUSTFILE, PROFILE, serving
from mooncake_bench.opened import INCOMPLETE, open_run
from mooncake_bench.records import Run, read_run
from mooncake_bench.replay.live_run import LiveRun
from mooncake_bench.replay.recorder import SERVER_STAMPS, STATUSES, Recorder, Verdict
from mooncake_bench.replay.run import MONITOR_EVERY_S
from mooncake_bench.replay.schedule import Plan
from mooncake_bench.replay.target import find_target

BEHIND_S, COST = 2.0, 0.03


def main(live_s: float) -> dict[str, Any]:
    """What was found."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "run"
        with serving(["--prefill", "2", "--decode", "2", "--profile", PROFILE]) as url:
            said = watched(directory, url, live_s)
            run = read_run(directory)
            killed = killed_run(Path(place) / "killed", url)
            spent = cost(run, Path(place), url)
    return {"requests": run.requests.height, **behind(run, said), **spent, **killed}


def wrong(found: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    problems = {
        "behind": found["behind_s_max"] > BEHIND_S,
        "cost": found["cpu_share_of_a_core"] > COST,
        "killed": found["killed"] != INCOMPLETE or not found["killed_says"],
        "samples": not found["killed_samples"],
    }
    return [name for name, is_so in problems.items() if is_so]


def locust(directory: Path, url: str, live_s: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--url", url]
    command += ["--trace", f"conversation-like:rate_rps=4,duration_s={live_s}"]
    command += ["--out", str(directory), "--loglevel", "ERROR", "--only-summary"]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)


def watched(directory: Path, url: str, live_s: float) -> list[tuple[float, int]]:
    """(time of perf_counter, requests that have ended by the page), as often as it can be read."""
    said = []
    replaying = locust(directory, url, live_s)
    command = [sys.executable, "-m", "mooncake_bench.cli", "dashboard", "--port", "0"]
    command.append(str(directory.parent))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        with sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page()
            page.goto(f"{address}?runs=run")
            while replaying.poll() is None:
                text = page.evaluate("document.querySelector('.running')?.textContent ?? ''")
                if match := re.search(r": ([\d,]+) of", text):
                    said.append((time.perf_counter(), int(match[1].replace(",", ""))))
                time.sleep(0.05)
            browser.close()
        server.terminate()
    return said


def behind(run: Run, said: list[tuple[float, int]]) -> dict[str, Any]:
    start = float(run.info.client["start_perf_counter_s"])
    ends_s = np.sort(run.requests["finished_s"].to_numpy())
    last_s = ends_s[-1]
    lags = []
    for now, count in said:
        at_s = now - start
        if count < ends_s.size and at_s < last_s:
            lags.append(max(0.0, at_s - float(ends_s[count])))
    return {"looks": len(lags), "behind_s_max": round(max(lags), 2),
            "behind_s_p50": round(float(np.median(lags)), 2)}  # fmt: skip  # One thought.


def cost(run: Run, place: Path, url: str) -> dict[str, Any]:
    """CPU seconds a second of the run that looking at it costs the run."""
    requests = run.requests
    names = ("request", "arrival_s", "input_tokens", "output_tokens")
    columns = [requests[name].to_numpy() for name in names]
    recorder = Recorder(columns[0], columns[1])
    live = LiveRun(place / "cost", run.info, Plan(*columns, hash_ids=pl.Series([], dtype=pl.Null)))
    for at, sent_s in enumerate(requests["sent_s"].to_list()):
        recorder.sent(at, sent_s)
    began, spent_s = time.perf_counter(), 0.0
    live.follow(find_target(url), began)
    verdicts = ended(run)
    length_s = verdicts[-1].at
    while verdicts:
        time.sleep(MONITOR_EVERY_S)
        now_s = time.perf_counter() - began
        while verdicts and verdicts[0].at <= now_s:
            recorder.settle(verdicts.pop(0))
        before_s = time.process_time()
        live.add(recorder.drain())
        spent_s += time.process_time() - before_s
    segments = sum(1 for _ in (place / "cost" / "segments").iterdir())
    live.close()
    return {"segments": segments, "cpu_share_of_a_core": round(spent_s / length_s, 4)}


def ended(run: Run) -> list[Verdict]:
    """How each request of the run ended, in order, as the client saw it."""
    gaps = metrics.token_gaps(run.requests, run.spans)
    gaps_s = dict(gaps.group_by("request", maintain_order=True).agg("gap_s").iter_rows())
    found = []
    for at, row in enumerate(run.requests.iter_rows(named=True)):
        first_s = row["first_token_s"]
        times = [] if first_s is None else [first_s, *gaps_s.get(row["request"], [])]
        timeline = {name: row[name] - row["sent_s"] for name in SERVER_STAMPS if row[name]}
        found.append(
            Verdict(
                at,
                STATUSES.index(row["status"]),
                row["finished_s"],
                row["reason"] or "",
                row["http_status"] or 0,
                array("d", np.cumsum(times)),
                timeline=timeline | {"prefill": row["prefill"], "decode": row["decode"]},
            )
        )
    return sorted(found, key=lambda one: one.at)


def killed_run(directory: Path, url: str) -> dict[str, Any]:
    """Kill the whole replay after ten seconds: what does the directory say?"""
    replaying = locust(directory, url, 60.0)
    time.sleep(14.0)
    os.killpg(replaying.pid, signal.SIGKILL)
    replaying.wait()
    time.sleep(0.2)
    run = open_run(directory)
    return {"killed": run.state, "killed_requests": run.frame.height,
            "killed_samples": run.samples.height,
            "killed_says": run.info.invalid_reasons}  # fmt: skip  # One thought.


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float, nargs="?", default=40.0)
    parser.add_argument("--check", action="store_true", help="exit 1 where something is wrong")
    options = parser.parse_args()
    found = main(options.seconds)
    problems = wrong(found)
    sys.stdout.write(json.dumps(found | {"wrong": problems}, indent=1) + "\n")
    sys.exit(int(options.check and bool(problems)))
