"""How does Locust drive the replay? It agrees the start, shows live figures, collects the records.

Locust's users do nothing here: each worker's requests are sent by the streaming engine in a process
of its own (engine_process.py). The master reads the trace, gives every worker its share, sets one
start for all, collects every record, and writes the run.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess  # gevent's: importing locust has patched it.
import sys
import time
from pathlib import Path
from typing import Any

import gevent
import locust.stats
import msgspec
import numpy as np
from gevent.event import Event
from locust import User, constant, events, task
from locust.runners import STATE_MISSING, MasterRunner, WorkerRunner

from mooncake_bench.records import RecordsError
from mooncake_bench.replay import wire
from mooncake_bench.replay.client import ClientStats
from mooncake_bench.replay.errors import ReplayError
from mooncake_bench.replay.live import LiveView, ttfts_s
from mooncake_bench.replay.live_run import LiveRun
from mooncake_bench.replay.options import (
    ReplayOptions,
    add_arguments,
    options_from,
    settle_salt,
)
from mooncake_bench.replay.prepare import load_trace
from mooncake_bench.replay.recorder import FAILED, REJECTED, Batch
from mooncake_bench.replay.run import begun, conclude, scraping, with_server_metrics, write
from mooncake_bench.replay.schedule import Plan, plan, share, share_of_sessions
from mooncake_bench.replay.scrape import Scraper
from mooncake_bench.replay.target import Target, find_target
from mooncake_bench.slo import SloError, parse_slos
from workloads.errors import TraceError
from workloads.trace import Trace

log = logging.getLogger(__name__)

START_MARGIN_S = 1.0
PINGS = 5
STOP_PATIENCE_S = 5.0
NICENESS = 19
"""Of Locust's own processes while engines send."""
EXIT_BAD_INPUT, EXIT_INVALID = 2, 3
LOCAL = "local"
"""The name under which a runner without workers sends messages to itself."""

# Locust keeps two significant digits of a time, too few beside an SLO.
locust.stats.bucket_response_time = lambda ms: round(ms, 1)  # type: ignore[assignment, return-value]  # keys may be floats


logging.getLogger("httpx").setLevel(logging.WARNING)  # Control calls are no news.


class FailedRequest(Exception):  # noqa: N818  # what Locust's failure table shows; never raised
    """A failed request; the message is its reason."""


class TraceReplay(User):
    """Keeps Locust's runner busy; the requests of the trace are sent by the engine process."""

    wait_time = constant(0)

    @task
    def wait(self) -> None:
        """Sleep: a task that returns would be started again."""
        gevent.sleep(3600.0)


class WorkerSide:
    """One a process that sends: passes orders to its engine process and reports to the master."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self._niceness = _niceness()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_done = Event()
        self._is_done.set()
        for name, listener in {
            "replay_ping": self._on_ping,
            "replay_prepare": self._on_prepare,
            "replay_start": self._on_start,
            "replay_stop": self._on_stop,
        }.items():
            environment.runner.register_message(name, listener)

    def finish(self) -> None:
        """Stop what is running, pass on what was measured, end the engine process."""
        self._order(wire.Stop())
        self._is_done.wait(STOP_PATIENCE_S)
        if self._process is not None:
            self._process.kill()

    def _on_ping(self, msg: Any, **_: Any) -> None:
        self._tell("replay_pong", {"sent": msg.data["sent"], "wall_s": time.time()})

    def _on_prepare(self, msg: Any, **_: Any) -> None:
        self.finish()
        self._is_done.clear()
        # Its own group: Ctrl-C is for Locust, which then asks the engine to stop. Not its own
        # session: Linux may weigh sessions against each other, whatever the niceness.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mooncake_bench.replay.engine_process", str(self._niceness)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=None if sys.platform == "win32" else 0,
        )
        _give_way()
        self._send(msg.data["job"])
        gevent.spawn(self._listen, self._process)

    def _on_start(self, msg: Any, **_: Any) -> None:
        self._order(wire.Start(msg.data["wall_s"]))

    def _on_stop(self, **_: Any) -> None:
        self._order(wire.Stop())

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        done = wire.Done(error="worker lost: its engine process ended early")
        while (frame := wire.read_frame(process.stdout)) is not None:
            report = wire.decode_report(frame)
            if isinstance(report, wire.Done):
                done = report
            elif isinstance(report, wire.Ready):
                self._tell("replay_ready", {"planned": report.planned})
            elif report.batch is not None:
                self._fire(report.batch)
                self._tell("replay_records", {"batch": msgspec.msgpack.encode(report.batch)})
        process.wait()
        if isinstance(self._environment.runner, WorkerRunner):
            # Or the page would end without what Locust reports every 3 s only.
            self._environment.runner._send_stats()
        self._tell("replay_done", {"done": wire.encode(done)})
        self._is_done.set()

    def _fire(self, batch: Batch) -> None:
        """Feed Locust's live tables; exact records travel beside them."""
        table = batch.table()
        e2e_s = table["finished_s"] - table["arrival_s"]
        rows = zip(table, ttfts_s(table), e2e_s, batch.reasons, strict=True)
        for row, ttft_s, whole_s, reason in rows:
            tokens = int(row["received_tokens"])
            if ttft_s == ttft_s:
                self._fire_one("ttft", ttft_s, 0)
            if row["status"] == REJECTED:
                self._fire_one("rejected", whole_s, 0)
            else:
                failure = FailedRequest(reason) if row["status"] == FAILED else None
                self._fire_one("request", whole_s, tokens, failure)

    def _fire_one(
        self, name: str, time_s: float, length: int, exception: Exception | None = None
    ) -> None:
        self._environment.events.request.fire(
            request_type="SSE",
            name=name,
            response_time=float(time_s) * 1e3,
            response_length=length,
            exception=exception,
            context={},
        )

    def _order(self, order: wire.Start | wire.Stop) -> None:
        if not self._is_done.is_set():
            self._send(wire.encode(order))

    def _send(self, frame: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            wire.write_frame(self._process.stdin, frame)
        except OSError:
            log.debug("the engine process has ended already")

    def _tell(self, name: str, data: dict[str, Any]) -> None:
        self._environment.runner.send_message(name, data)


class Share:
    """What the master knows of one worker's part."""

    def __init__(self) -> None:
        self.is_ready = Event()
        self.is_done = Event()
        self.stats: ClientStats | None = None
        self.error = ""
        self.offsets: list[tuple[float, float]] = []
        """(round trip, its clock minus ours) of each ping, seconds."""

    @property
    def clock_ahead_s(self) -> float:
        """The worker's clock minus ours; 0 where that is less than a ping can tell."""
        if not self.offsets:
            return 0.0
        round_trip_s, ahead_s = min(self.offsets)
        return ahead_s if abs(ahead_s) > round_trip_s else 0.0


class MasterSide:
    """Conducts a replay over all workers, or over the one local process."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self._runner = environment.runner
        self.phase = "idle"
        self.message = ""
        self._shares: dict[str, Share] = {}
        self._batches: list[Batch] = []
        self._view: LiveView | None = None
        self._live: LiveRun | None = None
        self._start = self._end = 0.0
        self._must_stop = Event()
        self._is_over = Event()
        self._is_over.set()
        for name, listener in {
            "replay_pong": self._on_pong,
            "replay_ready": self._on_ready,
            "replay_records": self._on_records,
            "replay_done": self._on_done,
        }.items():
            self._runner.register_message(name, listener)

    def begin(self) -> None:
        """Start conducting beside Locust."""
        if self._is_over.is_set():
            self._is_over.clear()
            self._must_stop.clear()
            _give_way()
            self._shares, self._batches, self._view, self._live = {}, [], None, None
            self._start = self._end = 0.0
            self.phase, self.message = "preparing", ""
            gevent.spawn(self._conduct)

    def finish(self) -> None:
        """End a replay under way, keeping what was measured; returns when it is written."""
        self._must_stop.set()
        self._is_over.wait(2 * STOP_PATIENCE_S + 30.0)

    @property
    def directory(self) -> str:
        """Where the run is written; "" if nowhere."""
        return str(self._environment.parsed_options.out or "")

    def snapshot(self) -> dict[str, Any]:
        """The state for the web page, as plain JSON."""
        until = self._end or time.perf_counter()
        elapsed_s = max(0.0, until - self._start) if self._start else 0.0
        live = self._view.snapshot(elapsed_s) if self._view is not None else {}
        done = sum(part.is_done.is_set() for part in self._shares.values())
        return {
            "phase": self.phase,
            "message": self.message,
            "workers": len(self._shares),
            "workers_done": done,
            **live,
        }

    def _conduct(self) -> None:
        try:
            exit_code = self._replay()
        except (ReplayError, TraceError, SloError, RecordsError) as error:
            self.phase, self.message, exit_code = "failed", str(error), EXIT_BAD_INPUT
            if self._live is not None:
                self._live.close(keep=True)
            log.error("%s", error)
            self._runner.send_message("replay_stop", {})
        self._environment.process_exit_code = exit_code
        self._end = time.perf_counter()
        self._is_over.set()
        if self._environment.parsed_options.headless:
            self._runner.quit()
        elif not self._must_stop.is_set():  # Or whoever stopped us goes on stopping.
            self._runner.stop()

    def _replay(self) -> int:
        """Prepare, start, wait, write; the exit code."""
        values = vars(self._environment.parsed_options)
        options = settle_salt(options_from(values | {"url": self._environment.host or ""}))
        slo, _ = parse_slos(options.slo)
        trace = load_trace(options)
        target = find_target(options.url, options.model)
        whole = plan(trace.frame, options.speed, waits_for_answers=options.sessions)
        self._view = LiveView(slo, len(whole))
        if options.out:
            self._live = LiveRun(Path(options.out), begun(trace, options, target), whole)
        with scraping(target, options) as scraper:
            self._prepare(trace, options, target)
            self._start_all()
            if self._live is not None:
                self._live.follow(target, self._start)
            self._await_done()
        return self._conclude(trace, whole, options, target, scraper)

    def _prepare(self, trace: Trace, options: ReplayOptions, target: Target) -> None:
        names = self._worker_names()
        if not names:
            raise ReplayError("no Locust worker is connected; start some or use --processes")
        self._shares = {name: Share() for name in names}
        for _ in range(PINGS):
            for name in names:
                self._runner.send_message("replay_ping", {"sent": time.time()}, name)
            gevent.sleep(0.02)
        for worker, name in enumerate(names):
            job = wire.Job(options, target, worker, len(names), trace.sha256, trace.frame.height)
            self._runner.send_message("replay_prepare", {"job": wire.encode(job)}, name)
        while not all(
            part.is_ready.is_set() or part.is_done.is_set() for part in self._shares.values()
        ):
            gevent.sleep(0.05)
            self._note_lost()
            if self._must_stop.is_set():
                raise ReplayError("stopped before the first request was sent; nothing is written")
        refused = [part.error for part in self._shares.values() if part.error]
        if refused:
            raise ReplayError(refused[0])

    def _start_all(self) -> None:
        wall_s = time.time() + START_MARGIN_S
        self._start = time.perf_counter() + START_MARGIN_S
        for name, part in self._shares.items():
            self._runner.send_message("replay_start", {"wall_s": wall_s + part.clock_ahead_s}, name)
        self.phase = "running"

    def _await_done(self) -> None:
        patience_until: float | None = None
        while not all(part.is_done.is_set() for part in self._shares.values()):
            if self._live is not None:
                self._live.add(None)  # What came in since the last segment may be due.
            if self._must_stop.wait(0.1) and patience_until is None:
                self._runner.send_message("replay_stop", {})
                patience_until = time.perf_counter() + STOP_PATIENCE_S
            if patience_until is not None:
                gevent.sleep(0.05)
                if time.perf_counter() > patience_until:
                    return
            self._note_lost()

    def _conclude(
        self,
        trace: Trace,
        whole: Plan,
        options: ReplayOptions,
        target: Target,
        scraper: Scraper | None,
    ) -> int:
        self.phase = "writing"
        engines = [part.stats for part in self._shares.values() if part.stats is not None]
        errors = sorted({part.error for part in self._shares.values() if part.error})
        lost = [
            share_of_sessions(trace.frame, worker, len(self._shares))
            if whole.after is not None
            else share(len(whole), worker, len(self._shares))
            for worker, part in enumerate(self._shares.values())
            if part.stats is None
        ]
        rows = np.concatenate(lost) if lost else None
        result = conclude(whole, self._batches, engines, options, target, self._start, rows)
        result = with_server_metrics(result, scraper, self._start, options.server)
        result.warnings.extend(errors)
        result.client["clocks_ahead_s"] = [part.clock_ahead_s for part in self._shares.values()]
        if options.out:
            write(dataclasses.replace(result, live=self._live), trace, options, Path(options.out))
            log.info("run written to %s", options.out)
        for text in (*result.invalid_reasons, *result.warnings):
            log.warning("%s", text)
        self.phase = "finished" if result.valid else "invalid"
        self.message = " ".join(result.invalid_reasons)
        return 0 if result.valid else EXIT_INVALID

    def _worker_names(self) -> list[str]:
        if not isinstance(self._runner, MasterRunner):
            return [LOCAL]
        clients = self._runner.clients
        return sorted(one.id for one in clients.ready + clients.spawning + clients.running)

    def _note_lost(self) -> None:
        if not isinstance(self._runner, MasterRunner):
            return
        for name, part in self._shares.items():
            client = self._runner.clients.get(name)
            if not part.is_done.is_set() and (client is None or client.state == STATE_MISSING):
                part.error = f"worker lost: {name} no longer answers"
                part.is_done.set()

    def _on_pong(self, msg: Any, **_: Any) -> None:
        if part := self._shares.get(msg.node_id):
            back, sent = time.time(), msg.data["sent"]
            part.offsets.append((back - sent, msg.data["wall_s"] - (sent + back) / 2))

    def _on_ready(self, msg: Any, **_: Any) -> None:
        if part := self._shares.get(msg.node_id):
            part.is_ready.set()

    def _on_records(self, msg: Any, **_: Any) -> None:
        if msg.node_id in self._shares and self._view is not None:
            batch = msgspec.msgpack.decode(msg.data["batch"], type=Batch)
            self._batches.append(batch)
            self._view.add(batch)
            if self._live is not None:
                self._live.add(batch)

    def _on_done(self, msg: Any, **_: Any) -> None:
        if part := self._shares.get(msg.node_id):
            done = wire.decode_report(msg.data["done"])
            assert isinstance(done, wire.Done)
            part.stats, part.error = done.stats, done.error
            part.is_done.set()


def _niceness() -> int:
    return 0 if sys.platform == "win32" else os.getpriority(os.PRIO_PROCESS, 0)


def _give_way() -> None:
    """Locust's tables may wait; where cores are few, the sending of requests may not."""
    if sys.platform != "win32" and _niceness() < NICENESS:
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)


def _add_flags(parser: Any) -> None:  # Locust passes it by name: it must be called `parser`.
    add_arguments(parser)


def _connect(environment: Any, **_: Any) -> None:
    """Give the process its sides. Listeners registered here run before the runner's own."""
    runner = environment.runner
    if not isinstance(runner, MasterRunner):
        worker = WorkerSide(environment)
        environment.events.quitting.add_listener(lambda **_: worker.finish())
    if isinstance(runner, WorkerRunner):
        # Failed requests are in the results; they do not make a worker's exit code red.
        environment.process_exit_code = 0
        return
    # Locust knows the address as its host: one field on its page, one value here.
    environment.host = environment.parsed_options.url or environment.host
    master = MasterSide(environment)
    environment.events.test_start.add_listener(lambda **_: master.begin())
    environment.events.test_stopping.add_listener(lambda **_: master.finish())
    environment.events.quitting.add_listener(lambda **_: master.finish())
    if environment.web_ui:
        _extend_web_ui(environment.web_ui, master)


def _extend_web_ui(web_ui: Any, master: MasterSide) -> None:
    """The route /replay (JSON), a tab with the same numbers, and /replay/figures."""
    columns = {"figure": "Figure", "value": "Value"}
    structure = [{"key": key, "title": title} for key, title in columns.items()]
    web_ui.template_args["extended_tabs"] = [{"title": "Replay", "key": "replay"}]
    web_ui.template_args["extended_tables"] = [{"key": "replay", "structure": structure}]

    @web_ui.app.route("/replay")  # type: ignore[untyped-decorator]  # Flask's, untyped here
    def replay_progress() -> dict[str, Any]:
        return master.snapshot()

    @web_ui.app.route("/replay/figures")  # type: ignore[untyped-decorator]  # Flask's, untyped here
    def replay_figures() -> Any:
        plain = {"Content-Type": "text/plain"}
        if not master.directory:
            return "Nothing is drawn of a run that is not written: give --out.\n", 404, plain
        command = [sys.executable, "-m", "mooncake_bench.replay.drawn", master.directory]
        drawing = subprocess.run(command, capture_output=True, check=False)
        return (drawing.stderr, 404, plain) if drawing.returncode else drawing.stdout

    @web_ui.app.after_request  # type: ignore[untyped-decorator]  # Flask's, untyped here
    def add_figures(response: Any) -> Any:
        from flask import request

        if request.path == "/stats/requests":
            rows = [{"figure": name, "value": value} for name, value in _rows(master.snapshot())]
            if master.directory:
                rows.append({"figure": "drawn", "value": "at /replay/figures"})
            extra = {"extended_stats": [{"key": "replay", "data": rows}]}
            response.set_data(msgspec.json.encode({**response.get_json(), **extra}))
        return response


def _rows(snapshot: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The snapshot as lines of a table."""
    rows = []
    for name, value in snapshot.items():
        if isinstance(value, dict):
            rows.extend(_rows(value, f"{prefix}{name} "))
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else "" if value is None else value
            rows.append((f"{prefix}{name}".replace("_", " "), str(shown)))
    return rows


_events: Any = events  # Locust's hooks are untyped.
_events.init_command_line_parser.add_listener(_add_flags)
_events.init.add_listener(_connect)
