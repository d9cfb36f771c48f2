"""`mooncake-bench serve` with vLLM's workers, as a process of a test."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.reference_cluster.vllm.workers import (
    BLOCK,
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    PAYLOAD_BYTES,
    START_S,
    count_in,
)

# Slower than any machine is, so that two long prompts at once are too many for the SLO below.
PROFILE = f"""
name = "pessimist"
model = "the tests' tiny Llama"
node = "one core"
source = "made up"
error = "none"
layers = {LAYERS}
kv_bytes_per_token = {2 * LAYERS * KV_HEADS * HEAD_DIM * 4}
device_kv_tokens = 1
dram_kv_tokens = 1
link_bytes_per_s = 1e9
prefill = {{ base_s = 0.01, token_s = 8e-3, token2_s = 0.0 }}
decode = {{ base_s = 0.01, sequence_s = 1e-4, context_token_s = 0.0 }}
"""
SLO_S = 100.0  # A prompt of 8,192 tokens is predicted to take 66 s.


def config_of(model: Path, profile: Path, **sections: dict[str, Any]) -> str:
    """1P+1D, or what the sections (of the top level: "") say, as TOML."""
    base: dict[str, dict[str, Any]] = {
        "": {
            "prefill_instances": 1,
            "decode_instances": 1,
            "block_tokens": BLOCK,
            "profile": str(profile),
        },
        "engine": {"kind": "vllm", "model": str(model), "dtype": "float32"},
        "conductor": {"admission": "early-rejection"},
        "prefill": {"chunk_tokens": 512},
        "slo": {"ttft_s": SLO_S, "tbt_s": 5.0},
        "network": {"transport": "shm"},
        "vllm": {"kv_bytes": 96 * PAYLOAD_BYTES, "pool_bytes": 480 * (PAYLOAD_BYTES + 64)},
    }
    base["vllm"]["dead_after_s"] = 5.0
    for name, fields in sections.items():
        section = base.setdefault("" if name == "top" else name, {})
        section |= fields
    lines = []
    for name, fields in base.items():
        lines += [f"[{name}]"] * bool(name)
        # JSON's numbers, strings, booleans and arrays of these are TOML's.
        lines += [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
    return "\n".join(lines)


class Served:
    """A cluster behind its HTTP front."""

    def __init__(self, config: str, directory: Path) -> None:
        file = directory / "cluster.toml"
        file.write_text(config)
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  # open while the process is
        words = [sys.executable, "-m", "mooncake_bench.cli", "serve", "--port", "0"]
        self.process = subprocess.Popen(
            [*words, "--config", str(file)],
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        self.http = httpx.Client(timeout=START_S, trust_env=False)

    def said(self) -> str:
        return os.pread(self.log.fileno(), 1 << 20, 0).decode(errors="replace")

    def wait(self) -> Served:
        """Until it serves; RuntimeError with the end of its log where it does not."""
        end_s = time.monotonic() + START_S
        while time.monotonic() < end_s and self.process.poll() is None:
            if found := re.search(r"at (http://[\w.:]+)", self.said()):
                self.http.base_url = httpx.URL(found.group(1))
                return self
            time.sleep(0.2)
        raise RuntimeError(self.said()[-3000:])

    def ask(self, prompt: list[int], tokens: int = 24, **more: Any) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        return self.http.post("/v1/completions", json=body | more)

    def tokens(self, prompt: list[int], tokens: int = 24) -> list[int]:
        """The model has no tokenizer: the text says the tokens' numbers."""
        answer = self.ask(prompt, tokens)
        assert answer.status_code == 200, answer.text
        return [int(word) for word in answer.json()["choices"][0]["text"].split()]

    def stream(self, prompt: list[int], tokens: int) -> Iterator[list[int]]:
        """The tokens of each event; AssertionError where it breaks."""
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        last = ""
        with self.http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            for line in filter(None, answer.iter_lines()):
                last = line
                if line.startswith("data: {"):
                    choices = json.loads(line[6:]).get("choices")
                    assert choices, line
                    yield [int(word) for word in choices[0]["text"].split()]
        assert last == "data: [DONE]"

    def row(self, name: str) -> dict[str, Any]:
        """What the Conductor knows of an instance."""
        rows = self.http.get("/cluster/info").json()["workers"]
        return next(row for row in rows if row["name"] == name)

    def count(self, name: str, metric: str, labels: str = "") -> float:
        """A counter of vLLM's, from the worker itself."""
        return count_in(httpx.get(f"{self.row(name)['url']}/metrics").text, metric, labels)

    def pool(self, name: str) -> dict[str, int]:
        """What the worker itself says that it moved and holds."""
        found: dict[str, int] = httpx.get(f"{self.row(name)['url']}/pool").json()
        return found

    def problems(self) -> list[str]:
        """Books that do not balance, and blocks or requests that somebody still holds."""
        told = self.http.get("/cluster/integrity").json()
        found = [f"{told['in_flight']} in flight"] * bool(told["in_flight"])
        found += filter(None, told["problems"].values())
        for row in self.http.get("/cluster/info").json()["workers"]:
            for key in ("engine_blocks", "pinned_blocks", "requests"):
                if row.get(key) or row["state"] != "member":
                    found.append(f"{row['name']} {row['state']} {key}={row.get(key)}")
        return found

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.log.close()


def wait_until_at_rest(cluster: Served) -> None:
    """All workers are there, and nobody holds anything: leases have ended, too."""
    end_s = time.monotonic() + START_S
    while problems := cluster.problems():
        assert time.monotonic() < end_s, problems
        time.sleep(0.2)
