"""How do people look at runs? `dashboard` in a browser, `watch` in a terminal."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from mooncake_bench.opened import RUNNING, Opened, is_run, open_run
from mooncake_bench.records import RecordsError
from mooncake_bench.watched import watched

LOCAL = ("127.0.0.1", "localhost", "::1")
Runs = Annotated[list[Path], typer.Argument(help="run or plan directories, or what holds them")]


def dashboard(
    runs: Runs,
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8050,
    host: Annotated[str, typer.Option(help="another than this machine's own needs a token")] = (
        "127.0.0.1"
    ),
    token: Annotated[str, typer.Option(help="who has it may look; made up where needed")] = "",
) -> None:
    """Look at runs in a browser, while they are written and after."""
    for path in runs:
        if not path.is_dir():
            raise RecordsError(
                f"{path}: no such directory; name run directories or what holds them"
            )
    from dashboards.app.store import Store

    store = Store(runs)
    store.read_ahead()
    try:
        from dashboards.app.server import build, serve
    except ModuleNotFoundError as error:
        raise RecordsError(
            f"the dashboard needs {error.name}; pip install 'mooncake-bench[dashboard]'"
        ) from None
    if host not in LOCAL and not token:
        token = secrets.token_urlsafe(16)
    try:
        server = serve(build(store, token), host, port)
    except OSError as error:
        raise RecordsError(f"--port {port}: {error.strerror}; choose another") from None
    query = f"?token={token}" if token else ""
    Console().print(
        f"http://{host}:{server.server_port}/{query}", highlight=False, soft_wrap=True, markup=False
    )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


def watch(
    run: Annotated[Path, typer.Argument(help="directory of a run, written to or ended")],
    every: Annotated[float, typer.Option(min=0.2, help="seconds between looks")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="one look, then end")] = False,
) -> None:
    """Follow a run in the terminal until it ends."""
    console = Console()
    opened = _opened(run, once)
    if not once and console.is_terminal:
        with Live(watched(opened), console=console, auto_refresh=False) as live:
            while opened.state == RUNNING:
                time.sleep(every)
                opened = open_run(run, opened)
                live.update(watched(opened), refresh=True)
        return
    while opened.state == RUNNING and not once:
        time.sleep(every)
        opened = open_run(run, opened)
    console.print(watched(opened))


def _opened(run: Path, once: bool) -> Opened:
    """The run; one that has not begun yet is waited for."""
    while not once and run.parent.is_dir() and not is_run(run):
        time.sleep(0.5)
    return open_run(run)
