"""How far is the page behind a Locust run, and what does the run pay for it? live.py [SECONDS].

A live 2P+2D, a Locust replay against it, the dashboard and a browser that watches the overview.
Each time the page says that N requests have ended, the run's own records say since when the
(N + 1)th had ended: that is how far the page is behind. The cost is the CPU time of making the
run's segments, at their pace, from its own records.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import sync_playwright

from mooncake_bench.demo import LOCUSTFILE, PROFILE, serving
from mooncake_bench.opened import open_run
from mooncake_bench.records import Run, read_run
from mooncake_bench.segments import EVERY_S, SegmentWriter


def main(live_s: float = 40.0) -> None:
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "run"
        with serving(["--prefill", "2", "--decode", "2", "--profile", PROFILE]) as url:
            said = watched(directory, url, live_s)
            run = read_run(directory)
            killed = killed_run(Path(place) / "killed", url)
        found = {"requests": run.requests.height, **behind(run, said), **cost(run, Path(place))}
    sys.stdout.write(json.dumps(found | killed, indent=1) + "\n")


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


def cost(run: Run, place: Path) -> dict[str, Any]:
    """CPU seconds a second of the run that its segments take."""
    writer = SegmentWriter(place / "cost", run.info, run.requests.height)
    length_s = float(run.requests["finished_s"].max())  # type: ignore[arg-type]  # A float.
    steps = int(length_s / EVERY_S)
    began_s = time.process_time()
    for step in range(steps):
        ended = run.requests["finished_s"].is_between(step * EVERY_S, (step + 1) * EVERY_S)
        rows = run.requests.filter(ended)
        spans = run.spans.filter(run.spans["request"].is_in(rows["request"].implode()))
        writer.append(requests=rows, spans=spans)
    spent_s = time.process_time() - began_s
    writer.close()
    return {"segments": steps, "cpu_share_of_a_core": round(spent_s / length_s, 4)}


def killed_run(directory: Path, url: str) -> dict[str, Any]:
    """Kill the whole replay after ten seconds: what does the directory say?"""
    import os

    replaying = locust(directory, url, 60.0)
    time.sleep(14.0)
    os.killpg(replaying.pid, signal.SIGKILL)
    replaying.wait()
    time.sleep(0.2)
    run = open_run(directory)
    return {"killed": run.state, "killed_requests": run.frame.height,
            "killed_says": run.info.invalid_reasons}  # fmt: skip  # One thought.


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
