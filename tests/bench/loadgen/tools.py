"""How is each tool told to do a part of the bench, and what does it report?"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from endpoint import REPO, Mock, Unavailable
from measure import Report, Seen, Usage, watched
from workload import INPUT_TOKENS, SLOWED, Part, mooncake_trace

HERE = Path(__file__).parent
LOCUSTFILE = REPO / "mooncake_bench" / "replay" / "locustfile.py"
OPEN = ("open50", "open200", "open500", "open1000")
ALL = ("closed16", "closed256", *OPEN, "bursts", "large")
LIMIT_S = 240.0


@dataclass(frozen=True, slots=True)
class Bench:
    """What every tool needs to know of this run of the bench."""

    environments: Path
    core: int
    scratch: Path
    niceness: int
    """Of every tool alike: below 0 keeps the machine's other users out of the figures."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A load generator: which parts it can do, the package it needs, and how it is run."""

    name: str
    parts: tuple[str, ...]
    package: str
    run: Callable[[Bench, Part, Mock], tuple[Report, Usage]]
    python: str = ""


def environment(bench: Bench, tool: Tool) -> Path:
    """The tool's own virtual environment, made once. Raises Unavailable with pip's last line."""
    directory = bench.environments / tool.package
    if (directory / ".installed").exists():
        return directory
    python = _interpreter(tool.python) if tool.python else sys.executable
    made = subprocess.run([python, "-m", "venv", directory], capture_output=True, text=True)
    if made.returncode == 0:
        wanted = [tool.package] + (["uvloop"] if tool.package == "aiohttp" else [])
        pip = [directory / "bin" / "python", "-m", "pip", "install", "--quiet", *wanted]
        made = subprocess.run(pip, capture_output=True, text=True)
    if made.returncode:
        said = (made.stderr.strip() or made.stdout.strip()).splitlines() or ["no reason given"]
        raise Unavailable(f"{tool.name}: cannot be installed: {said[-1]}")
    (directory / ".installed").touch()
    return directory


def _interpreter(name: str) -> str:
    """A Python of that version, also where only pyenv knows it. Raises Unavailable."""
    kept = Path.home() / ".pyenv" / "versions"
    found = [name, *kept.glob(f"{name.removeprefix('python')}*/bin/python")]
    for one in filter(None, map(shutil.which, map(str, found))):
        if subprocess.run([one, "--version"], capture_output=True).returncode == 0:
            return one
    raise Unavailable(f"{name} is not installed")


def measured(
    bench: Bench,
    command: list[Any],
    variables: dict[str, str] | None = None,
    ok: tuple[int, ...] = (0,),
    beside: tuple[int, ...] = (),
) -> Usage:
    """Run the command on the client's core to its end; the processes `beside` it count as well.

    Raises Unavailable with its last words.
    """
    with _started(bench, command, variables) as process, watched(process.pid, *beside) as usage:
        try:
            _, said = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"no end within {LIMIT_S:.0f} s") from None
    if process.returncode not in ok:
        last = (said.decode(errors="replace").strip().splitlines() or ["nothing said"])[-1]
        raise Unavailable(f"exit code {process.returncode}: {last[:200]}")
    return usage


def _variables(more: dict[str, str] | None) -> dict[str, str]:
    known = os.environ | {"TOKENIZERS_PARALLELISM": "false"} | (more or {})
    known.pop("HF_HUB_OFFLINE", None)  # Set to anything, it keeps aiperf from a local tokenizer.
    return known


@contextlib.contextmanager
def _started(
    bench: Bench, command: list[Any], variables: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    words = ["nice", "-n", str(bench.niceness), "taskset", "-c", str(bench.core)]
    words += map(str, command)
    process = subprocess.Popen(
        words,
        env=_variables(variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd=bench.scratch,
    )
    # Linux may weigh whole sessions against each other instead of processes.
    with contextlib.suppress(OSError):
        Path(f"/proc/{process.pid}/autogroup").write_text(str(bench.niceness))
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- ours ------------------------------------------------------------------------------------


def ours(bench: Bench, part: Part, mock: Mock) -> tuple[Report, Usage]:
    """`mooncake-bench replay`, as a user runs it."""
    command = [sys.executable, "-m", "mooncake_bench.cli", "replay"]
    command += _replay_flags(bench, part, mock)
    usage = measured(bench, command, ok=(0, 3))
    return _our_report(bench.scratch / "run"), usage


def _replay_flags(bench: Bench, part: Part, mock: Mock) -> list[Any]:
    rows = int(28_000 * part.seconds * 16 / part.tokens)  # More than the mock can serve.
    trace = mooncake_trace(part, bench.scratch / "trace.jsonl", rows)
    flags = ["--trace", trace, "--url", mock.url, "--out", bench.scratch / "run"]
    flags += ["--speed", SLOWED]
    return flags if part.is_open else [*flags, "--concurrency", part.streams]


def _our_report(run: Path) -> Report:
    info = json.loads((run / "run.json").read_text())
    start_ns = info["client"]["start_perf_counter_s"] * 1e9
    requests = pl.read_parquet(run / "requests.parquet").filter(
        pl.col("first_token_s").is_not_null()
    )
    ends = pl.read_parquet(run / "spans.parquet").select(
        "request", at=(pl.col("start_s") + pl.col("first_gap_s"))
    )
    later = dict(ends.group_by("request", maintain_order=True).agg("at").iter_rows())
    report = Report(start_ns=start_ns)
    columns = requests.select("request", "sent_s", "first_token_s")
    for request, sent_s, first_s in columns.iter_rows():
        times = [first_s, *later.get(request, [])]
        report.by_request[str(request)] = Seen(
            start_ns + sent_s * 1e9, [start_ns + at * 1e9 for at in times]
        )
    return report


def ours_locust(bench: Bench, part: Part, mock: Mock) -> tuple[Report, Usage]:
    """Locust's --processes 2: a master and two workers, each with its engine process."""
    flags = ["--headless", "--processes", 2, *_replay_flags(bench, part, mock)]
    port = _free_port()
    bind = ["--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--master-port", port]
    command = [sys.executable, "-m", "locust", "-f", LOCUSTFILE, *flags, *bind]
    usage = measured(bench, command, ok=(0, 3))
    return _our_report(bench.scratch / "run"), usage


def ours_locust_hosts(bench: Bench, part: Part, mock: Mock) -> tuple[Report, Usage]:
    """A master and two workers started by hand, as on three hosts."""
    port = _free_port()
    locust = [sys.executable, "-m", "locust", "-f", LOCUSTFILE]
    worker = [*locust, "--worker", "--master-host", "127.0.0.1", "--master-port", port]
    bind = ["--master-bind-host", "127.0.0.1", "--master-bind-port", port]
    wait = ["--headless", "--master", "--expect-workers", 2]
    with _started(bench, worker) as one, _started(bench, worker) as other:
        command = [*locust, *wait, *bind, *_replay_flags(bench, part, mock)]
        usage = measured(bench, command, ok=(0, 3), beside=(one.pid, other.pid))
    return _our_report(bench.scratch / "run"), usage


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- clients by hand -------------------------------------------------------------------------


def aiohttp(bench: Bench, part: Part, mock: Mock) -> tuple[Report, Usage]:
    """aiohttp + uvloop, json.loads an event."""
    python = bench.environments / "aiohttp" / "bin" / "python"
    plan, out = _plan(bench, part, mock), bench.scratch / "out.json"
    usage = measured(bench, [python, HERE / "clients" / "aiohttp_client.py", plan, out])
    return _client_report(part, out), usage


def locust_fasthttp(bench: Bench, part: Part, mock: Mock) -> tuple[Report, Usage]:
    """Locust's FastHttpUser with readline, by hand."""
    program = bench.environments / "locust" / "bin" / "locust"
    out = bench.scratch / "out.json"
    variables = {"PLAN": str(_plan(bench, part, mock)), "OUT": str(out)}
    users = part.streams or 1
    flags = ["--headless", "-u", users, "-r", users, "--host", mock.url, "--exit-code-on-error", 0]
    flags += [] if part.is_open else ["-t", f"{part.seconds:.0f}s"]
    command = [program, "-f", HERE / "clients" / "locust_client.py", *flags]
    usage = measured(bench, command, variables)
    return _client_report(part, out), usage


def _plan(bench: Bench, part: Part, mock: Mock) -> Path:
    plan: dict[str, Any] = {"url": mock.url, "tokens": part.tokens}
    if part.is_open:
        plan["due_s"] = [row.due_s for row in part.rows]
    else:
        plan |= {"concurrency": part.streams, "seconds": part.seconds}
    path = bench.scratch / "plan.json"
    path.write_text(json.dumps(plan))
    return path


def _client_report(part: Part, out: Path) -> Report:
    records = [one for one in json.loads(out.read_text()) if one["rid"] != "-1"]
    report = Report(
        by_request={one["rid"]: Seen(one["sent_ns"], one["times_ns"]) for one in records}
    )
    if part.is_open and records:
        first = records[0]
        report.start_ns = first["due_ns"] - part.rows[int(first["rid"])].due_s * 1e9
    return report


# ---- LLM load generators ---------------------------------------------------------------------


def tokenizer(bench: Bench) -> Path:
    """A tokenizer of whole words, made locally by aiperf's own libraries: nothing is fetched."""
    directory = bench.environments / "tokenizer"
    if not (directory / "tokenizer.json").exists():
        for package in ("aiperf", "guidellm", "inference-perf"):
            python = bench.environments / package / "bin" / "python"
            if python.exists():
                script = HERE / "clients" / "make_tokenizer.py"
                subprocess.run([python, script, directory], check=True, capture_output=True)
                break
    return directory


def aiperf(bench: Bench, part: Part, mock: Mock) -> tuple[Report, Usage]:
    """`aiperf profile`: a fixed schedule, or a concurrency."""
    rows, out = bench.scratch / "aiperf.jsonl", bench.scratch / "aiperf"
    text = "the " * INPUT_TOKENS
    if part.is_open:
        values = [
            {"timestamp": row.due_s * 1e3, "text_input": text, "output_length": part.tokens}
            for row in part.rows
        ]
        shape = ["--custom-dataset-type", "mooncake_trace", "--fixed-schedule"]
    else:
        values = [{"text": text}] * 64
        count = int(300 * part.seconds * 16 / part.tokens)
        shape = ["--custom-dataset-type", "single_turn", "--concurrency", part.streams]
        shape += ["--request-count", count]
    rows.write_text("".join(json.dumps(value) + "\n" for value in values))
    program = bench.environments / "aiperf" / "bin" / "aiperf"
    flags = ["-m", "mock", "--url", mock.url, "--endpoint-type", "chat", "--streaming"]
    flags += ["--tokenizer", tokenizer(bench), "--use-server-token-count", "--ui", "none"]
    flags += ["--input-file", rows, "--artifact-dir", out, *shape]
    usage = measured(bench, [program, "profile", *flags])
    report = Report()
    for line in (out / "profile_export.jsonl").read_text().splitlines():
        record = json.loads(line)
        metrics, sent = record["metrics"], float(record["metadata"]["request_start_ns"])
        if "time_to_first_token" not in metrics:
            continue
        times = [sent + metrics["time_to_first_token"]["value"] * 1e6]
        for gap_ms in metrics.get("inter_chunk_latency", {}).get("value", []):
            times.append(times[-1] + gap_ms * 1e6)
        report.by_request[record["metadata"]["x_request_id"]] = Seen(sent, times)
    return report, usage


def guidellm(bench: Bench, part: Part, mock: Mock) -> tuple[Report, Usage]:
    """`guidellm run`: replay at timestamps, or concurrent streams."""
    rows, out = bench.scratch / "guidellm.jsonl", bench.scratch / "guidellm.json"
    columns = {"prompt_tokens_column": "prompt", "output_tokens_column": "output"}
    if part.is_open:
        trace = [
            {"timestamp": row.due_s, "prompt": row.input_tokens, "output": part.tokens}
            for row in part.rows
        ]
        rows.write_text("".join(json.dumps(value) + "\n" for value in trace))
        source = {"kind": "json_file", "path": str(rows)}
        data = {"kind": "trace_synthetic", "source": source, **columns}
        shape = ["--profile", "kind=replay,schedule_turn=timestamp"]
    else:
        data = {
            "kind": "synthetic_text",
            "prompt_tokens": INPUT_TOKENS,
            "output_tokens": part.tokens,
        }
        count = max(200, int(100 * part.seconds * 16 / part.tokens))
        shape = ["--profile", f"kind=concurrent,streams={part.streams}"]
        shape += ["--constraint", f"kind=max_requests,count={count}"]
    backend = {"kind": "openai_http", "target": mock.url, "model": "mock"}
    words = {"kind": "hf_auto", "model": str(tokenizer(bench))}
    flags = ["--backend", json.dumps(backend), "--data", json.dumps(data), *shape]
    flags += ["--tokenizer", json.dumps(words), "--output", f"kind=json,path={out}"]
    program = bench.environments / "guidellm" / "bin" / "guidellm"
    usage = measured(bench, [program, "run", *flags, "--disable-progress"])
    requests = json.loads(out.read_text())["benchmarks"][0]["requests"]["successful"]
    values = [one["time_to_first_token_ms"] for one in requests]
    return Report(ttft_ms=[value for value in values if value is not None]), usage


def inference_perf(bench: Bench, part: Part, mock: Mock) -> tuple[Report, Usage]:
    """`inference-perf`: it replays no trace; Poisson at the same rate, or a concurrency."""
    out = bench.scratch / "inference-perf"
    lengths = {"std_dev": 0, "total_count": 512}
    if part.is_open:
        seconds = round(part.rows[-1].due_s)
        stages = [{"rate": len(part.rows) / seconds, "duration": seconds}]
        load = {"type": "poisson", "stages": stages}
    else:
        count = int(400 * part.seconds * 16 / part.tokens)
        load = {"type": "concurrent"}
        load["stages"] = [{"num_requests": count, "concurrency_level": part.streams}]
    config = {
        "api": {"type": "completion", "streaming": True},
        "data": {
            "type": "random",
            "input_distribution": _always(INPUT_TOKENS) | lengths,
            "output_distribution": _always(part.tokens) | lengths,
        },
        "load": load | {"num_workers": 1, "worker_max_concurrency": 2000},
        "server": {"type": "vllm", "model_name": "mock", "base_url": mock.url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": str(tokenizer(bench))},
        "report": {"request_lifecycle": {"summary": True, "per_request": True}},
        "storage": {"local_storage": {"path": str(out)}},
    }
    path = bench.scratch / "inference-perf.json"
    path.write_text(json.dumps(config))  # JSON is YAML.
    program = bench.environments / "inference-perf" / "bin" / "inference-perf"
    usage = measured(bench, [program, "-c", path])
    requests = json.loads((out / "per_request_lifecycle_metrics.json").read_text())
    times = [
        (one["start_time"], one["info"].get("response_metrics", one["info"])) for one in requests
    ]
    values = [
        (metrics["output_token_times"][0] - start) * 1e3
        for start, metrics in times
        if metrics.get("output_token_times")
    ]
    return Report(ttft_ms=values, has_own_times=True), usage


def _always(value: int) -> dict[str, int]:
    return {"min": value, "max": value, "mean": value}


PEER_PARTS = ("closed16", *OPEN[:3])
OURS, LOCUST = "ours", "ours, Locust 1+2 forked"
TOOLS = (
    Tool(OURS, ALL, "", ours),
    Tool(LOCUST, ("open500",), "", ours_locust),
    Tool("ours, Locust 1+2 by hand", ("open500",), "", ours_locust_hosts),
    Tool("Locust FastHttpUser", ("closed16", "closed256", *OPEN), "locust", locust_fasthttp),
    Tool("aiohttp + uvloop", ("closed16", "closed256", *OPEN), "aiohttp", aiohttp),
    Tool("aiperf", PEER_PARTS, "aiperf", aiperf),
    Tool("guidellm", PEER_PARTS, "guidellm", guidellm),
    Tool("inference-perf", PEER_PARTS, "inference-perf", inference_perf, "python3.12"),
)
LLM_PEERS = ("aiperf", "guidellm", "inference-perf")
