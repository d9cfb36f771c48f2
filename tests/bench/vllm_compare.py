"""Is vLLM faster in one prefill and one decode worker, or in two that do both? On two cores.

    .venv/bin/python -m tests.bench.vllm_compare --python VENV/bin/python [--out build/vllm-compare]

The first 300 requests of Mooncake's conversation trace, lengths divided by 64 (about 190 prompt and
6 output tokens, blocks of 8), are replayed by Locust against 1P+1D over our pool, and against two
colocated workers that are chosen by prefix. Each worker has a core, one OMP thread, steps of up to
2,048 tokens, the same KV memory, prefix caching and chunked prefill. Every run starts cold, in the
order A B B A. The model is a Llama of random weights, made in --model if it is not there. The load
generator and the Conductor run on the same two cores.

Prints means of every stage, and writes report.html with all runs. Four minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from mooncake_bench.demo import LOCUSTFILE
from mooncake_bench.records import Run, read_run
from mooncake_bench.report import write_report
from tests.bench.cluster_bytes import MissingTraceError, the_trace
from tests.bench.live_cluster import INVALID, serving, write_trace

SCALE = 64
REPLAY_S_MAX = 900.0
START_S_MAX = 300.0
SLO = "ttft<1s,tbt<100ms"
MAKE_MODEL = (
    "import sys; from pathlib import Path; "
    "from tests.reference_cluster.vllm.workers import save_tiny_model; "
    "save_tiny_model(Path(sys.argv[1]), vocabulary=32_000, layers=4)"
)
COMMON = """
block_tokens = 32
profile = "tiny-vllm-cpu"
sample_every_s = 1.0
[slo]
ttft_s = 1.0
tbt_s = 0.1
[engine]
kind = "vllm"
model = {model}
dtype = "float32"
[vllm]
launch = [{python}]
kv_bytes = 134217728
pool_bytes = 134217728
max_model_len = 4096
[workers]
cpus = [[{cpus[0]}], [{cpus[1]}]]
[prefill]
chunk_tokens = 2048
"""
SYSTEMS = {
    "1P+1D": """
prefill_instances = 1
decode_instances = 1
network = {{ transport = "shm" }}
colocated = {{ step_tokens_max = 2048 }}
""",
    "2 colocated": """
system = "colocated"
colocated_instances = 2
colocated = {{ batching = "chunked", prefix_caching = true, step_tokens_max = 2048 }}
""",
}

results = Console(width=120)


def scaled(trace: Path, requests: int) -> list[dict[str, Any]]:
    """The first requests, lengths divided and rounded up; a block of 512 tokens is one of 8."""
    rows = []
    for line in trace.read_text().splitlines()[:requests]:
        row = json.loads(line)
        for name in ("input_length", "output_length"):
            row[name] = -(-row[name] // SCALE)
        rows.append(row)
    return rows


def replay(url: str, trace: Path, out: Path, name: str, speed: float) -> Run:
    """By Locust, one process."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless"]
    command += ["--url", url, "--trace", str(trace), "--block-tokens", str(512 // SCALE)]
    command += ["--speed", str(speed), "--jitter", "--slo", SLO, "--name", name, "--out", str(out)]
    command += ["--loglevel", "ERROR", "--only-summary", "--exit-code-on-error", "0"]
    log = out.with_suffix(".locust.log")
    with log.open("wb") as file:
        done = subprocess.run(command, stdout=file, stderr=file, timeout=REPLAY_S_MAX, check=False)
    if done.returncode not in (0, INVALID):
        raise RuntimeError(f"Locust ended with {done.returncode}: {log.read_text()[-500:]}")
    return read_run(out)


def warm(url: str) -> None:
    """All workers at once: the first steps of a process are slow."""

    def ask(seed: int) -> None:
        body = {"prompt": [seed + 5] * 300, "max_tokens": 8, "ignore_eos": True}
        httpx.post(f"{url}/v1/completions", json=body, timeout=60.0).raise_for_status()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(32)))


@dataclass(frozen=True, slots=True)
class Measured:
    """A run, and the CPU seconds of the cluster's processes in it."""

    run: Run
    cpu_s: dict[str, float]


def cpu_s(pid: int) -> float:
    """Of all its threads so far (proc(5): utime and stime, the 14th and 15th field)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measured(system: str, chosen: argparse.Namespace, trace: Path, number: int) -> Measured:
    out: Path = chosen.out / f"{number}-{system.replace(' ', '-')}"
    config = SYSTEMS[system] + COMMON
    names: dict[str, Any] = {"cpus": sorted(os.sched_getaffinity(0))}
    names |= {name: json.dumps(str(getattr(chosen, name))) for name in ("model", "python")}
    leftovers: list[str] = []
    with serving(config.format(**names), chosen.out, leftovers, start_s_max=START_S_MAX) as cluster:
        warm(cluster.url)
        pids = {name: row["pid"] for name, row in cluster.workers().items()}
        pids["conductor"] = cluster.conductor_pid
        before = {name: cpu_s(pid) for name, pid in pids.items()}
        run = replay(cluster.url, trace, out, f"{system}, run {number}", chosen.speed)
        used = {name: cpu_s(pid) - before[name] for name, pid in pids.items()}
        leftovers += cluster.settled()
    if leftovers:
        raise RuntimeError("; ".join(leftovers))
    return Measured(run, used)


def show(done: Sequence[Measured]) -> None:
    """Milliseconds, but for the first two columns and those of CPU seconds; stages are means."""
    table = Table("run", "finished", "in SLO", "TTFT", "p90", "TBT", "p90", "CPU seconds")
    stages = Table("run", *done[0].run.summary["stages_s"])
    for one in done:
        run, told = one.run, one.run.summary
        cpu = ", ".join(f"{name} {seconds:.1f}" for name, seconds in one.cpu_s.items())
        times = [told[name][at] for name in ("ttft_s", "tbt_s") for at in ("mean", "p90")]
        attained = f"{told['attainment']:.1%}"
        table.add_row(
            run.info.name, str(told["finished"]), attained, *map(milliseconds, times), cpu
        )
        stages.add_row(run.info.name, *map(milliseconds, told["stages_s"].values()))
    results.print(table)
    results.print(stages)


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.1f}"


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.bench.vllm_compare", description=__doc__)
    parser.add_argument("--python", type=Path, default=Path(".venvs/vllm/bin/python"))
    parser.add_argument("--model", type=Path, default=Path("build/tiny-llama"))
    parser.add_argument("--out", type=Path, default=Path("build/vllm-compare"))
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--speed", type=float, default=3.0)
    parser.add_argument("--order", default="ABBA", help="A: 1P+1D, B: 2 colocated")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    chosen = parse(words)
    chosen.python, chosen.model = chosen.python.absolute(), chosen.model.absolute()
    chosen.out.mkdir(parents=True, exist_ok=True)
    try:
        rows = scaled(the_trace(), chosen.requests)
    except MissingTraceError as error:
        results.print(str(error))
        return 2
    if not (chosen.model / "config.json").exists():
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([chosen.python, "-c", MAKE_MODEL, chosen.model], env=environment, check=True)
    trace = write_trace(chosen.out / "trace.jsonl", rows)
    systems = {"A": "1P+1D", "B": "2 colocated"}
    done = [
        measured(systems[letter], chosen, trace, number)
        for number, letter in enumerate(chosen.order, 1)
    ]
    show(done)
    page = write_report([one.run for one in done], chosen.out / "report.html")
    results.print(f"open {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
