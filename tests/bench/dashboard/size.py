"""How fast is the dashboard on a large run? size.py RUN [--check]; large_run.py makes RUN.

A server of its own on two cores, a browser in front of it: seconds until a page has drawn its
figures after it was opened, and after each interaction; the server's largest memory. `--check`
ends with 1 where a page took 3 s to open, an interaction 1 s, or the server 2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

PAGES = ("overview", "slo", "latency", "request", "cluster", "cache", "rejections")
OPEN_S, INTERACTION_S, MEMORY_MIB = 3.0, 1.0, 2e9 / 2**20
TOUCH = """for (const plot of document.querySelectorAll(".js-plotly-plot")) {
  plot.isOld = true;
  for (const name of ["plotly_afterplot", "plotly_react"]) plot.on(name, () => plot.isOld = false);
}"""
DRAWN = """() => [...document.querySelectorAll("[data-figure]")].every((figure) => {
  const plot = figure.querySelector(".js-plotly-plot");
  return plot && plot.querySelector(".main-svg") && !plot.isOld;
})"""
"""Every figure of the page has its drawing, none of them one from before the touch."""


def main(run: Path) -> dict[str, Any]:
    """What was found; MiB and seconds."""
    command = [sys.executable, "-m", "mooncake_bench.cli", "dashboard", str(run), "--port", "0"]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    began_s = time.monotonic()
    found: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        found["server_starts_s"] = round(time.monotonic() - began_s, 2)
        try:
            found |= measured(url)
        finally:
            status = Path(f"/proc/{server.pid}/status").read_text()
            found["server_memory_max_mib"] = int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) // 1024
            server.terminate()
    return found


def slow(found: dict[str, Any]) -> list[str]:
    """What took longer, or more, than it may."""
    late = [f"opening {name}" for name, took_s in found["opens_s"].items() if took_s >= OPEN_S]
    late += [name for name, took_s in found["interactions_s"].items() if took_s >= INTERACTION_S]
    return late + ["memory"] * (found["server_memory_max_mib"] >= MEMORY_MIB)


def measured(url: str) -> dict[str, Any]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        opens = {name: opened(page, url + name) for name in PAGES}
        opened(page, url + "slo")
        interactions = {
            "TTFT bound, one step": touched(page, slider(page, 0, "ArrowRight")),
            "TBT bound, one step": touched(page, slider(page, 1, "ArrowLeft")),
            "TBT statistic": touched(page, chosen(page, "longest gap")),
        }
        opened(page, url + "latency")
        interactions["TBT instead of TTFT"] = touched(page, chosen(page, "TBT"))
        interactions["end to end"] = touched(page, chosen(page, "end to end"))
        interactions["by reused tokens"] = touched(page, chosen(page, "reused tokens"))
        link = page.locator('[data-table="slowest"] tbody a').first
        interactions["a slow request's journey"] = touched(page, link.click)
        opened(page, url + "cluster")
        interactions["waiting requests"] = touched(page, chosen(page, "waiting requests"))
        browser.close()
    return {"opens_s": opens, "interactions_s": interactions}


def opened(page: Any, url: str) -> float:
    began_s = time.monotonic()
    page.goto(url, timeout=300_000)
    page.wait_for_selector("#page > *", timeout=300_000)
    page.wait_for_selector("#controls .control")
    drawn(page)
    return round(time.monotonic() - began_s, 2)


def drawn(page: Any) -> None:
    page.wait_for_function(DRAWN, timeout=60_000)


def touched(page: Any, touch: Any) -> float:
    """Seconds from a touch to the server's answer, drawn."""
    page.evaluate(TOUCH)
    with page.expect_response(
        lambda answer: "page.children" in (answer.request.post_data or "")
        and answer.status == 200, timeout=60_000
    ):  # fmt: skip  # One thought.
        began_s = time.monotonic()
        touch()
    drawn(page)
    return round(time.monotonic() - began_s, 2)


def slider(page: Any, which: int, key: str) -> Any:
    thumb = page.locator("#controls [role=slider]").nth(which)
    thumb.focus()
    return lambda: page.keyboard.press(key)


def chosen(page: Any, text: str) -> Any:
    return page.locator("#controls").get_by_text(text, exact=True).click


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 where something is slow")
    options = parser.parse_args()
    found = main(options.run)
    late = slow(found)
    sys.stdout.write(json.dumps(found | {"slow": late}, indent=1) + "\n")
    sys.exit(int(options.check and bool(late)))
