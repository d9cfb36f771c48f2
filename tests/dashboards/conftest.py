"""A directory of runs and a dashboard over it."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dashboards.app.store import Store
from mooncake_bench import demo
from tests.dashboards.browser import Watched
from tests.mooncake_bench.conftest import made_up_run
from tests.mooncake_bench.test_plan_run import PLAN, planned

LIVE_S = 8.0


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Live 2P+2D (with refusals) against 4 colocated, and a simulated 8P+8D; not to be changed."""
    where = tmp_path_factory.mktemp("runs")
    live: dict[str, Any] = {"source": "live-modelled", "requests": 300, "rps": 0.8, "instances": 4}
    made_up_run(where / "live-d", name="2P+2D", reject=0.06, **live)
    made_up_run(where / "live-c", name="4 colocated", system="colocated", slow=1.5, **live)
    made_up_run(where / "sim-d", name="8P+8D", requests=1500)
    return where


@pytest.fixture(scope="session")
def two_plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small plan, and another one; not to be changed."""
    where = tmp_path_factory.mktemp("plans")
    # In a thread of its own: Playwright's loop runs in this one.
    with ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit(planned, where / "made", PLAN.format(nodes=12)).result()
    for name in ("first", "second"):
        (where / name).mkdir()
        shutil.copy(where / "made" / "out" / "plan.json", where / name)
    shutil.rmtree(where / "made")
    return where


@pytest.fixture(scope="session")
def demo_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs as `mooncake-bench demo` makes them: those in MOONCAKE_DEMO, or shorter live ones."""
    if made := os.environ.get("MOONCAKE_DEMO"):
        return Path(made)
    where = tmp_path_factory.mktemp("demo")
    for name in ("simulated-8p8d", "simulated-16-colocated"):
        demo.simulated(where / name, name, str)
    for name in demo.LIVE:
        demo.live(where / name, name, LIVE_S, str)
    return where


@pytest.fixture
def serving() -> Iterator[Callable[..., str]]:
    """Starts a dashboard on a free port and gives its address."""
    server_of = pytest.importorskip("dashboards.app.server", reason="dash is not installed")
    servers = []

    def start(*roots: Path, token: str = "") -> str:
        server = server_of.serve(server_of.build(Store(roots), token), "127.0.0.1", 0)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The system's Chromium, headless, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(names)} on PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def watch(chromium: Any, runs: Path, serving: Callable[..., str]) -> Iterator[Any]:
    """Opens pages over `runs`, or over other directories; in none of them anything goes wrong."""
    opened: list[Watched] = []

    def start(*roots: Path, **options: Any) -> Watched:
        opened.append(Watched(chromium, serving(*(roots or (runs,))), **options))
        return opened[-1]

    yield start
    for one in opened:
        one.page.close()
        assert one.errors == []
