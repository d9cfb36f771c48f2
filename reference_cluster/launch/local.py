"""How is a live cluster of processes run on one host? A supervisor starts, restarts and ends them.

It computes nothing and holds no state of the cluster: the Conductor's process can end and come
back while the workers go on. Whatever ends the supervisor ends all of them (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import Profile
from reference_cluster.errors import ServeError
from reference_cluster.launch.process import write_cluster
from reference_cluster.transports.bytes import sweep

log = logging.getLogger(__name__)
NAP_S = 0.2  # How often the supervisor looks whether somebody is due to start again.
END_S_MAX = 5.0  # A process that was asked to end is killed after so long.
RESTART_S_MIN = 0.2  # Between two starts of the same process, doubled while it fails at once.
RESTART_S_MAX = 10.0
STARTS_MAX = 3  # Of a worker that ends before all have said hello.
LIVED_S = 10.0  # Whoever lived so long did not fail at once.
CONDUCTOR = "conductor"


class Child:
    """One process that is started again when it ends, at a decent pace."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        self.name = name
        self.command = command
        self.environment = environment
        self.pass_fds: tuple[int, ...] = ()
        self.process: subprocess.Popen[bytes] | None = None
        self.started_s = 0.0
        self.pause_s = RESTART_S_MIN
        self.starts = 0

    def start(self) -> None:
        # A session of its own: Ctrl-C in a terminal is for the supervisor alone.
        self.process = subprocess.Popen(
            self.command,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=self.pass_fds,
        )
        self.started_s = time.monotonic()
        self.starts += 1

    @property
    def has_ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def restart_when_due(self) -> None:
        """Start an ended process again, after a pause that grows while it fails at once."""
        assert self.process is not None
        now_s = time.monotonic()
        if now_s - self.started_s > LIVED_S:
            self.pause_s = RESTART_S_MIN
        if now_s - self.started_s >= self.pause_s:
            log.warning("%s ended (%s); starting it again", self.name, self.process.returncode)
            self.pause_s = min(2 * self.pause_s, RESTART_S_MAX)
            self.start()

    def ask_to_end(self) -> None:
        if self.process is not None and not self.has_ended:
            self.process.terminate()

    def end(self, deadline_s: float) -> None:
        """Wait until it has ended; kill it at the deadline, a point of the monotonic clock."""
        if self.process is None:
            return
        try:
            self.process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class LocalWorkers:
    """The workers of one cluster as children of this process, and the directory they meet in."""

    def __init__(self, config: ClusterConfig, profile: Profile) -> None:
        sweep_all()
        self.config = config
        self.id = f"{os.getpid()}-{secrets.token_hex(3)}"
        self.directory = tempfile.mkdtemp(prefix=f"mcb-{self.id}-")  # Of mode 0700.
        write_cluster(self.directory, config, profile)
        # Servers that have addresses run already.
        names = [] if config.engine.kind == "vllm" and config.vllm.urls else config.instance_names
        self.children = [self.child(place, name) for place, name in enumerate(names)]

    def child(self, place: int, name: str) -> Child:
        environment: dict[str, str] = {}
        module, launch = "reference_cluster.worker", [sys.executable]
        if self.config.engine.kind == "vllm":
            module = "reference_cluster.launch.vllm"
            launch = [*self.config.vllm.launch] or launch
            # Connectors that find blocks by vLLM's hashes need the same ones everywhere.
            environment = {"PYTHONHASHSEED": "0", **self.config.vllm.environment}
        if place < len(self.config.workers.devices):
            environment["CUDA_VISIBLE_DEVICES"] = self.config.workers.devices[place]
        command = self.command(module, "--name", name, launch=launch)
        return Child(name, command, environment)

    def command(
        self, module: str, *arguments: str, launch: Sequence[str] = (sys.executable,)
    ) -> list[str]:
        place = ["--directory", self.directory, "--parent", str(os.getpid())]
        return [*launch, "-m", module, *arguments, *place]

    def __enter__(self) -> Self:
        for child in self.children:
            child.start()
        return self

    def watch(self) -> None:
        """Start whoever has ended again; called now and then, at once after a child has ended."""
        for child in self.children:
            if child.has_ended:
                self.sweep()
                if self.config.workers.restart:
                    child.restart_when_due()

    def sweep(self) -> None:
        """Remove the shared memory of workers that were killed."""
        sweep(f"mcb-{self.id}-")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in self.children:
            child.ask_to_end()
        deadline_s = time.monotonic() + END_S_MAX
        for child in self.children:
            child.end(deadline_s)
        self.sweep()
        shutil.rmtree(self.directory, ignore_errors=True)


def sweep_all() -> None:
    """What clusters left behind whose supervisor was killed."""
    sweep("mcb-")
    for path in Path(tempfile.gettempdir()).glob("mcb-*-*-*"):
        supervisor = path.name.split("-")[1]
        if supervisor.isdecimal() and not Path("/proc", supervisor).exists():
            shutil.rmtree(path, ignore_errors=True)


class Supervisor:
    """The whole cluster: workers, and the Conductor with its HTTP front, until a signal comes."""

    def __init__(
        self,
        config: ClusterConfig,
        profile: Profile,
        listening: socket.socket,
        token: str | None,
    ) -> None:
        self.workers = LocalWorkers(config, profile)
        self.ready, told = os.pipe()
        os.set_blocking(self.ready, False)
        descriptors = ["--listen", str(listening.fileno()), "--tell", str(told)]
        command = self.workers.command("reference_cluster.serve", *descriptors)
        environment = {"MOONCAKE_BENCH_TOKEN": token} if token else {}
        self.conductor = Child(CONDUCTOR, command, environment)
        self.conductor.pass_fds = (listening.fileno(), told)
        self.told = told
        self.stopped_by: int | None = None

    def run(self, on_ready: Callable[[], None]) -> None:
        """Serve until SIGINT or SIGTERM; raises ServeError where the cluster does not start."""
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
        before = {number: signal.signal(number, self.note) for number in signals}
        woken, wakes = socket.socketpair()
        woken.setblocking(False)
        wakes.setblocking(False)
        signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        self.woken = woken
        try:
            with self.workers:
                self.conductor.start()
                self.loop(on_ready)
                # The Conductor first: what it serves may come to an end, with the workers' help.
                self.conductor.ask_to_end()
                self.conductor.end(time.monotonic() + END_S_MAX)
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            woken.close()
            wakes.close()
            os.close(self.ready)
            os.close(self.told)
        if self.stopped_by == signal.SIGINT:
            raise KeyboardInterrupt

    def note(self, number: int, frame: object) -> None:
        """A signal; that it came ends the nap of the loop."""
        if number != signal.SIGCHLD:
            self.stopped_by = number

    def loop(self, on_ready: Callable[[], None]) -> None:
        is_ready = False
        while self.stopped_by is None:
            # A signal, a child's end among them, is heard at once; the rest is for restarts.
            if select.select([self.woken.fileno(), self.ready], [], [], NAP_S)[0]:
                with contextlib.suppress(BlockingIOError):
                    self.woken.recv(64)
            self.workers.watch()
            if not is_ready:
                self.check_starts()
            if not is_ready and self.told_ready():
                is_ready = True
                on_ready()
            if self.conductor.has_ended:
                if not is_ready or not self.workers.config.workers.restart:
                    raise ServeError("the Conductor did not start; see what it said above")
                self.conductor.restart_when_due()

    def check_starts(self) -> None:
        """A worker that ends again and again before all are there will not come."""
        for child in self.workers.children:
            if child.has_ended and child.starts >= STARTS_MAX:
                raise ServeError(f"{child.name} does not start; see what it said above")

    def told_ready(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            return bool(os.read(self.ready, 64))
        return False
