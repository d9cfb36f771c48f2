"""How fast do bytes move, against a plain memcpy, iperf3 and Mooncake's own engine, in one run?

    .venv/bin/python tests/bench/transport/run.py [--check] [--rounds 5] [--env-dir DIR]

Every round measures every contestant at every size in turn; bounds are medians of the rounds'
ratios, never absolute times. All transfers go round through memory larger than the caches, as
KVCache blocks lie. `--check` ends with 1 where a bound is missed or could not be measured. iperf3
is Debian's (apt-get install iperf3); Mooncake's engine goes into a virtual environment under
--env-dir, made once. Where one is missing, the rest is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from reference_cluster.transports.bytes import ByteTransport, Endpoint, Range, Segment, sweep
from reference_cluster.transports.shm import ShmTransport
from reference_cluster.transports.tcp import TcpTransport

REPO = Path(__file__).resolve().parents[3]
KIB, MIB = 1 << 10, 1 << 20
TOTAL = 320 * MIB
PREFIX = "mcb-bench-"
ENGINE = "mooncake-transfer-engine-non-cuda==0.3.13.post1"

results = Console()
diagnostics = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of transfer: `count` ranges of `size` bytes in one batch."""

    operation: str
    size: int
    count: int = 1

    def __str__(self) -> str:
        size = f"{self.size // MIB} MiB" if self.size >= MIB else f"{self.size // KIB} KiB"
        return f"{self.operation} {f'{self.count} x ' if self.count > 1 else ''}{size}"

    @property
    def total(self) -> int:
        return self.size * self.count


SHAPES = ((64 * KIB, 1), (MIB, 1), (16 * MIB, 1), (256 * MIB, 1), (64 * KIB, 64))
CASES = [Case(operation, *shape) for shape in SHAPES for operation in ("read", "write")]


@dataclass(frozen=True, slots=True)
class Bound:
    """`who` is at least `least` times as fast as `than`, at these cases."""

    who: str
    than: str
    least: float
    cases: tuple[Case, ...]


def cases_of(*sizes: int) -> tuple[Case, ...]:
    return tuple(case for case in CASES if case.count == 1 and case.size in sizes)


BOUNDS = (
    Bound("shm", "memcpy", 0.8, tuple(CASES)),
    Bound("tcp", "iperf3", 0.8, cases_of(16 * MIB)),
    Bound("tcp", "mooncake tcp", 1.5, cases_of(MIB)),
    Bound("tcp", "mooncake tcp", 1.2, cases_of(16 * MIB)),
)


@dataclass(slots=True)
class Rates:
    """Bytes a second of each contestant at each case, one of each round."""

    of: dict[tuple[str, Case], list[float]] = field(default_factory=dict)

    def add(self, who: str, case: Case, times: list[float]) -> None:
        self.of.setdefault((who, case), []).append(case.total / statistics.median(times))

    def ratio(self, bound: Bound, case: Case) -> float | None:
        """The median of the rounds' ratios."""
        mine, other = self.of.get((bound.who, case)), self.of.get((bound.than, case))
        if not mine or not other:
            return None
        return statistics.median(one / two for one, two in zip(mine, other, strict=True))


class Rotation:
    """Where the next transfer lies: round and round, past what the caches hold."""

    def __init__(self) -> None:
        self.at = 0

    def next(self, case: Case) -> list[Range]:
        if self.at + case.total > TOTAL:
            self.at = 0
        ranges = [Range(self.at + i * case.size, case.size) for i in range(case.count)]
        self.at += case.total
        return ranges


async def timed(
    case: Case, seconds: float, rotation: Rotation, move: Callable[[list[Range]], Awaitable[None]]
) -> list[float]:
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        ranges = rotation.next(case)
        begin = time.perf_counter()
        await move(ranges)
        times.append(time.perf_counter() - begin)
    return times


class Memcpy:
    """The plain copy between the same two mapped segments, in this thread."""

    def __init__(self, own: Segment, peer: Segment) -> None:
        self.own, self.peer = own, peer
        self.rotation = Rotation()

    async def times(self, case: Case, seconds: float) -> list[float]:
        target, source = self.own.address, self.peer.address
        if case.operation == "write":
            target, source = source, target

        async def move(ranges: list[Range]) -> None:
            for one in ranges:
                ctypes.memmove(target + one.offset, source + one.offset, one.length)

        return await timed(case, seconds, self.rotation, move)


class Ours:
    def __init__(self, transport: ByteTransport, peer: Endpoint) -> None:
        self.transport, self.peer = transport, peer
        self.rotation = Rotation()

    async def times(self, case: Case, seconds: float) -> list[float]:
        call = self.transport.read if case.operation == "read" else self.transport.write
        return await timed(
            case, seconds, self.rotation, lambda ranges: call(self.peer, ranges, ranges, 60.0)
        )


class Engine:
    """Mooncake's engine, driven in its own processes and called as its users call it."""

    def __init__(self, python: Path) -> None:
        command = [str(python), str(Path(__file__).with_name("engine.py")), str(TOTAL)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.hear() == "ready"

    def hear(self) -> object:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    async def times(self, case: Case, seconds: float) -> list[float]:
        assert self.process.stdin is not None
        line = json.dumps([case.operation, case.size, case.count, seconds])
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        times = self.hear()
        assert isinstance(times, list)
        return times

    def close(self) -> None:
        self.process.communicate()


class Iperf:
    """One stream of iperf3 for as long as it needs to get going; its buffer stays in the cache."""

    async def times(self, case: Case, seconds: float) -> list[float]:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            address = f"-p{probe.getsockname()[1]}"
        rate = await asyncio.to_thread(iperf_rate, address)
        return [case.total / rate]


def iperf_rate(address: str) -> float:
    """Bytes a second, as the receiver counts them."""
    server = subprocess.Popen(
        ["iperf3", "-s", "-1", "-B", "127.0.0.1", address], stdout=subprocess.DEVNULL
    )
    time.sleep(0.3)
    client = ["iperf3", "-J", "-c", "127.0.0.1", "-t", "1", address]
    done = subprocess.run(client, check=True, capture_output=True, text=True)
    server.wait(10)
    rate: float = json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]
    return rate / 8


def serve() -> None:
    """The peer process: one segment, reached by every transport of ours."""

    async def main() -> None:
        memory = Segment.create(TOTAL, PREFIX)
        memory.buffer[:] = b"\x01" * TOTAL
        transports: list[ByteTransport] = [ShmTransport(), TcpTransport()]
        endpoints = [await transport.start(memory) for transport in transports]
        sys.stdout.write(msgspec.json.encode(endpoints).decode() + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)
        for transport in transports:
            await transport.close()
        memory.close()

    asyncio.run(main())


@contextlib.contextmanager
def peer_process() -> Iterator[list[Endpoint]]:
    command = [sys.executable, __file__, "--serve"]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        yield msgspec.json.decode(process.stdout.readline(), type=list[Endpoint])
        process.communicate()


def engine_python(directory: Path) -> Path | None:
    """The Python that has Mooncake's engine; made where it is missing."""
    python = directory / "bin" / "python"
    if not python.exists():
        diagnostics.print(f"making {directory} for {ENGINE}")
        try:
            subprocess.run([sys.executable, "-m", "venv", directory], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", ENGINE, "numpy"], check=True)
        except subprocess.CalledProcessError as error:
            diagnostics.print(f"no Mooncake engine: {error}")
    probe = [python, "-c", "import mooncake.engine"]
    found = python.exists() and subprocess.run(probe, capture_output=True, check=False)
    if not found or found.returncode != 0:
        diagnostics.print("Mooncake's engine cannot be imported (apt-get install libibverbs1?)")
        return None
    return python


async def measure(rounds: int, seconds: float, python: Path | None) -> Rates:
    rates = Rates()
    own = Segment.create(TOTAL, PREFIX)
    own.buffer[:] = b"\x02" * TOTAL
    with peer_process() as (by_shm, by_tcp):
        theirs = Segment.attach(by_shm.segment)
        shm, tcp = ShmTransport(), TcpTransport()
        await shm.start(own)
        await tcp.start(own)
        contestants = {
            "memcpy": Memcpy(own, theirs),
            "shm": Ours(shm, by_shm),
            "tcp": Ours(tcp, by_tcp),
        }
        engine = Engine(python) if python else None
        if engine:
            contestants["mooncake tcp"] = engine
        for case in CASES:  # Pages and connections are there from now on.
            for contestant in contestants.values():
                await contestant.times(case, 0.01)
        for _ in range(rounds):
            for case in CASES:
                for who, contestant in contestants.items():
                    rates.add(who, case, await contestant.times(case, seconds))
                if has_iperf() and case in cases_of(16 * MIB):
                    rates.add("iperf3", case, await Iperf().times(case, seconds))
        if engine:
            engine.close()
        await shm.close()
        await tcp.close()
        theirs.close()
    own.close()
    return rates


def has_iperf() -> bool:
    try:
        subprocess.run(["iperf3", "--version"], capture_output=True, check=True)
    except FileNotFoundError:
        return False
    return True


def report(rates: Rates) -> bool:
    """One table; are all bounds met?"""
    names = list(dict.fromkeys(who for who, _ in rates.of))
    table = Table("transfer", *names, "bounds", title="GB/s (latency), medians of the rounds")
    is_met = True
    for case in CASES:
        cells = []
        for who in names:
            found = rates.of.get((who, case))
            rate = statistics.median(found) if found else 0.0
            cells.append(f"{rate / 1e9:.2f} ({case.total / rate * 1e6:,.0f} us)" if found else "")
        judged = []
        for bound in BOUNDS:
            if case not in bound.cases:
                continue
            ratio = rates.ratio(bound, case)
            good = ratio is not None and ratio >= bound.least
            is_met = is_met and good
            value = "not measured" if ratio is None else f"{ratio:.2f}"
            verdict = "met" if good else "[red]MISSED[/red]"
            judged.append(f"{bound.who}/{bound.than} {value} >= {bound.least}: {verdict}")
        table.add_row(str(case), *cells, "\n".join(judged))
    results.print(table)
    return is_met


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="end with 1 where a bound is missed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="measured for each cell")
    parser.add_argument("--env-dir", type=Path, default=REPO / "build" / "bench-mooncake")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    python = engine_python(arguments.env_dir)
    try:
        rates = asyncio.run(measure(arguments.rounds, arguments.seconds, python))
    finally:
        sweep(PREFIX)
    is_met = report(rates)
    if arguments.check and not is_met:
        sys.exit(1)


if __name__ == "__main__":
    main()
