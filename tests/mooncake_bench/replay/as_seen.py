"""Does a server see the trace: its rows, its lengths, its shared prefixes? Recorded on the way.

    python tests/mooncake_bench/replay/as_seen.py --seconds 600 serve|mock

replays so much of the conversation trace at its own speed against `mooncake-bench serve` or the C
mock endpoint, through a proxy that notes what each request asks for; then compares. Ends with 1 and
a line for each difference. The trace is looked for in MOONCAKE_TRACES (default ../shared/traces).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mooncake_bench.demo import serving
from mooncake_bench.records import Run, read_run
from reference_cluster.blocks import prefix_hashes
from workloads.trace import open_trace
from workloads.transform import window

REPO = Path(__file__).resolve().parents[3]
sys.path.append(str(REPO / "tests" / "bench" / "loadgen"))
import endpoint  # noqa: E402  # of that bench, which is no package

TRACE = Path(os.environ.get("MOONCAKE_TRACES", REPO.parent / "shared" / "traces"))
TRACE /= "conversation_trace.jsonl"
BLOCK_TOKENS = 512
# Enough for the trace at its own speed: nothing is refused, and nobody waits for long.
CLUSTER = ["--prefill", "12", "--decode", "12"]
READ_BYTES = 1 << 16


async def proxy(upstream: str, notes: Path) -> None:
    """Pass requests on to `host:port`; a line of JSON a POST. Says its own URL on stdout."""
    host, _, port = upstream.rpartition(":")
    file = notes.open("w")

    async def back(answers: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        while data := await answers.read(READ_BYTES):
            client.write(data)
            await client.drain()
        client.close()

    async def serve(requests: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        answers, server = await asyncio.open_connection(host, int(port))
        answering = asyncio.create_task(back(answers, client), name="proxy-back")
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await requests.readuntil(b"\r\n\r\n")
                at = time.perf_counter()
                headers = read_head(head)
                body = await requests.readexactly(int(headers.get("content-length", 0)))
                server.write(head + body)
                await server.drain()
                if body:
                    file.write(json.dumps(noted(headers, json.loads(body), at)) + "\n")
                    file.flush()
        server.close()
        await asyncio.gather(answering, return_exceptions=True)

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 24)
    print("http://{}:{}".format(*listener.sockets[0].getsockname()), flush=True)  # noqa: T201
    await listener.serve_forever()


def read_head(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {name.lower(): value.strip() for name, _, value in pairs}


def noted(headers: dict[str, str], body: dict[str, Any], at: float) -> dict[str, Any]:
    """What is compared: the prompt by the prefix hashes that the cluster itself would make."""
    return {
        "request": int(headers["x-request-id"]),
        "at": at,
        "input_tokens": len(body["prompt"]),
        "output_tokens": body["max_tokens"],
        "keys": prefix_hashes(body["prompt"], BLOCK_TOKENS),
    }


@contextlib.contextmanager
def recorded(url: str, notes: Path) -> Iterator[str]:
    """The URL of a proxy before `url`, in a process of its own."""
    command = [sys.executable, __file__, "--proxy", url.removeprefix("http://"), str(notes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def replayed(url: str, seconds: float, out: Path, *flags: str) -> tuple[Run, pl.DataFrame, Path]:
    """Replay the trace's first seconds; (the run, the rows meant, the notes of what was seen)."""
    notes = out / "seen.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    with recorded(url, notes) as proxied:
        command = [sys.executable, "-m", "mooncake_bench.cli", "replay", "--url", proxied]
        command += ["--trace", str(TRACE), "--window", f"0-{seconds:g}", "--out", str(out / "run")]
        # As token ids, so that a length means the same to all. A shared machine may be late.
        command += ["--max-lag", "60", "--max-cpu", "9", "--max-stall", "60", *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_run(out / "run"), window(open_trace(str(TRACE)), 0.0, seconds).frame, notes


def differences(meant: pl.DataFrame, notes: Path) -> list[str]:
    """What the server saw otherwise than the trace says: a line each, none if all is equal."""
    seen = {}
    lines = []
    for text in notes.read_text().splitlines():
        note = json.loads(text)
        if note["request"] in seen:
            lines.append(f"request {note['request']} was sent twice")
        seen[note["request"]] = note
    if set(seen) != set(meant["request"]):
        lines.append(f"{len(set(meant['request']) ^ set(seen))} rows are missing or too many")
    chains: dict[tuple[int, int], int] = {}
    """(The chain before, block id) -> the chain."""
    key_of: dict[int, int] = {}
    chain_of: dict[int, int] = {}
    for row in meant.iter_rows(named=True):
        if (note := seen.get(row["request"])) is None:
            continue
        lines += [
            f"request {row['request']}: {name} {note[name]}, not {row[name]}"
            for name in ("input_tokens", "output_tokens")
            if note[name] != row[name]
        ]
        if len(note["keys"]) != len(row["hash_ids"]):
            lines.append(f"request {row['request']}: {len(note['keys'])} blocks")
            continue
        chain = 0
        for block, key in zip(row["hash_ids"], note["keys"], strict=True):
            chain = chains.setdefault((chain, block), len(chains) + 1)
            # Equal in the trace if and only if equal to the server.
            if key_of.setdefault(chain, key) != key or chain_of.setdefault(key, chain) != chain:
                lines.append(f"request {row['request']}: block {block} has another prefix")
                break
    return lines


@contextlib.contextmanager
def mock(program: Path) -> Iterator[str]:
    """The C mock endpoint of tests/bench/loadgen, 50 ms to a first token, 10 ms to the others."""
    with tempfile.TemporaryDirectory() as directory:
        core = min(os.sched_getaffinity(0))
        with endpoint.running(program, Path(directory), core, 50.0, 10.0, 16) as running:
            yield running.url


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--proxy"]:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(proxy(arguments[1], Path(arguments[2])))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target", choices=("serve", "mock"))
    parser.add_argument("--seconds", type=float, default=600.0, help="of the trace")
    parser.add_argument("--out", type=Path, default=REPO / "build" / "as-seen")
    options = parser.parse_args(arguments)
    is_mock = options.target == "mock"
    program = endpoint.build(options.out / "program") if is_mock else Path()
    with mock(program) if is_mock else serving(CLUSTER) as url:
        run, meant, notes = replayed(url, options.seconds, options.out / options.target)
    start = run.info.client["start_perf_counter_s"]
    seen = pl.read_ndjson(notes, schema_overrides={"keys": pl.List(pl.UInt64)})
    joined = meant.join(seen.select("request", "at"), on="request")
    late_ms = (joined["at"] - start - joined["arrival_s"]).to_numpy() * 1e3
    counts = run.summary["offered"], run.summary["finished"], seen.height
    blocks = int(seen["keys"].list.len().sum())
    print("offered {}, finished {}, seen {}".format(*counts), f"with {blocks} blocks")  # noqa: T201
    print("late by ms, p50 and p99:", np.quantile(late_ms, (0.5, 0.99)).round(2))  # noqa: T201
    found = differences(meant, notes)
    print("\n".join(found[:20]) or "as the trace says")  # noqa: T201
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
