"""Is the torch engine as fast as vLLM's CPU build? Interleaved, in CPU time, medians of ratios.

    OMP_NUM_THREADS=1 python tests/bench/engine/compare.py --model DIR --vllm-python VENV/bin/python

Both engines get the same weights, prompts of the same lengths, one thread and chunks of 2,048
tokens, in one process each that live throughout; every repeat of a point runs on one, then on the
other, the order alternating. A ratio is vLLM's CPU time over ours of one repeat (its median step
for decoding). Exit code 1 if a point misses its bound.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PREFILL_TOKENS = (512, 2048, 8192)
DECODES = tuple((batch, context) for batch in (1, 8, 32) for context in (64, 2048))


@dataclass(frozen=True)
class Point:
    name: str
    command: dict[str, Any]
    bound: float
    repeats: int


def points(steps: int, repeats: int) -> list[Point]:
    prefills = [
        # Short ones are noisier and cheaper.
        Point(
            f"prefill {n}", {"work": "prefill", "tokens": n}, 1.0, repeats * (3 if n < 8192 else 1)
        )
        for n in PREFILL_TOKENS
    ]
    decodes = [
        Point(
            f"decode batch {batch} context {context}",
            {"work": "decode", "batch": batch, "context": context, "steps": steps},
            1.3,
            repeats,
        )
        for batch, context in DECODES
    ]
    return [*prefills, *decodes]


class Child:
    """One engine in its own process."""

    def __init__(self, python: str, kind: str, model: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [python, str(HERE / "sides.py"), kind, model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"an engine ended with {self.process.wait()}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def cpu_s(self, command: dict[str, Any]) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return statistics.median(self.read()["cpu_s"])


def measure(ours: Child, vllm: Child, point: Point) -> tuple[list[float], list[float]]:
    mine, theirs = [], []
    for child in (ours, vllm):
        child.cpu_s(point.command)  # Warm up: allocators, code paths, caches.
    for repeat in range(point.repeats):
        if repeat % 2:
            theirs.append(vllm.cpu_s(point.command))
            mine.append(ours.cpu_s(point.command))
        else:
            mine.append(ours.cpu_s(point.command))
            theirs.append(vllm.cpu_s(point.command))
    return mine, theirs


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--vllm-python", required=True)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--only", default="")
    arguments.add_argument("--out", type=Path)
    chosen = arguments.parse_args()
    ours = Child(sys.executable, "ours", chosen.model)
    vllm = Child(chosen.vllm_python, "vllm", chosen.model)
    rows, has_missed = [], False
    for point in points(chosen.steps, chosen.repeats):
        if chosen.only not in point.name:
            continue
        mine, theirs = measure(ours, vllm, point)
        ratios = sorted(b / a for a, b in zip(mine, theirs, strict=True))
        ratio = statistics.median(ratios)
        has_missed |= ratio < point.bound
        rows.append({"point": point.name, "ratios": ratios, "ours_s": mine, "vllm_s": theirs})
        sys.stdout.write(
            f"{point.name:32} ours {statistics.median(mine) * 1e3:8.2f} ms  vLLM "
            f"{statistics.median(theirs) * 1e3:8.2f} ms  ratio {ratio:.2f} "
            f"[{ratios[0]:.2f} {ratios[-1]:.2f}]  bound {point.bound}\n"
        )
        sys.stdout.flush()
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(rows, indent=1))
    sys.exit(int(has_missed))


if __name__ == "__main__":
    main()
