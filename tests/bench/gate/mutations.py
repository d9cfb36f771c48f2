"""Does tier 1 see a change of one line? Each policy is broken once, and the gate must say so.

    python tests/bench/gate/mutations.py [--python .venvs/312/bin/python ...]

Copies the packages, changes one line at a time there, and runs the gate; then runs it unchanged
under five hash seeds with every interpreter given.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[3]
PACKAGES = ("mooncake_bench", "reference_cluster", "workloads", "dashboards")
POLICIES = "reference_cluster/policies/"
HASH_SEEDS = ("0", "1", "42", "4711", "31337")
GATE = ["-m", "mooncake_bench.cli", "gate", "--baseline", "tests/golden"]
GATE += ["--scenarios", "tests/golden/scenarios.toml"]

# (what is broken, file, line as it is, line as it becomes)
MUTATIONS = (
    (
        "fetch threshold flipped",
        POLICIES + "scheduling.py",
        "holder.tokens > self.balancing_threshold * reused_tokens",
        "holder.tokens < self.balancing_threshold * reused_tokens",
    ),
    (
        "queue term dropped from Algorithm 1",
        POLICIES + "scheduling.py",
        "self.ttft_s(request, view, prefill.queue_s)",
        "self.ttft_s(request, view, 0.0 * prefill.queue_s)",
    ),
    (
        "transfer term dropped from Algorithm 1",
        POLICIES + "scheduling.py",
        "transfer_s.append((moving_s, instances))",
        "transfer_s.append((0.0, instances))",
    ),
    (
        "ties to the highest id",
        POLICIES + "scheduling.py",
        "chosen = int(first.argmin())",
        "chosen = len(first) - 1 - int(first[::-1].argmin())",
    ),
    (
        "local cache aware fetches too",
        POLICIES + "scheduling.py",
        'own pool alone."""\n\n    is_fetching = False',
        'own pool alone."""\n\n    is_fetching = True',
    ),
    (
        "least loaded takes the most loaded",
        POLICIES + "scheduling.py",
        "least(view.prefill.queue_s, view.prefill.context_tokens)",
        "least(-view.prefill.queue_s, view.prefill.context_tokens)",
    ),
    (
        "random always takes the first",
        POLICIES + "scheduling.py",
        "self.rng.choice(there if len(there) else range(len(view.prefill)))",
        "there[0]",
    ),
    (
        "decode choice blind to what is expected",
        POLICIES + "scheduling.py",
        "batch = instances.batch + instances.expected",
        "batch = instances.batch",
    ),
    (
        "decode choice blind to room",
        POLICIES + "scheduling.py",
        "is_full = instances.free_tokens < request.kv_tokens",
        "is_full = instances.free_tokens < 0",
    ),
    (
        "TTFT limit doubled",
        POLICIES + "admission.py",
        "if placement.ttft_s > slo.ttft_s:",
        "if placement.ttft_s > 2 * slo.ttft_s:",
    ),
    (
        "TBT limit of early rejection flipped",
        POLICIES + "admission.py",
        "if placement.tbt_s > self.slo.tbt_s:",
        "if placement.tbt_s < self.slo.tbt_s:",
    ),
    (
        "predictive rejection looks at now",
        POLICIES + "admission.py",
        "at_s = view.now_s + placement.ttft_s",
        "at_s = view.now_s",
    ),
    (
        "predicted TBT compared with the TTFT limit",
        POLICIES + "admission.py",
        "        if tbt_s > self.slo.tbt_s:",
        "        if tbt_s > self.slo.ttft_s:",
    ),
    (
        "room for prompts only",
        POLICIES + "admission.py",
        "free_tokens < request.kv_tokens",
        "free_tokens < request.input_tokens",
    ),
    (
        "load-based never rechecks",
        POLICIES + "admission.py",
        'prefilled for nothing.\n    """\n\n    is_rechecking = True',
        'prefilled for nothing.\n    """\n\n    is_rechecking = False',
    ),
    (
        "prediction: a decode never ends",
        POLICIES + "prediction.py",
        "if begin_s <= at_s < begin_s + decode_s(request):",
        "if begin_s <= at_s:",
    ),
    (
        "prediction: the request itself forgotten",
        POLICIES + "prediction.py",
        "return others_s + cost.step_s(1, request.input_tokens)",
        "return others_s",
    ),
    (
        "LRU turned MRU",
        POLICIES + "eviction.py",
        '"lru": OrderedDict,',
        '"lru": type("Mru", (OrderedDict,), {"popitem": lambda s, last: OrderedDict.popitem(s)}),',
    ),
    (
        "LRU turned LFU",
        POLICIES + "eviction.py",
        '"lru": OrderedDict,',
        '"lru": LeastFrequentlyUsed,',
    ),
    (
        "LFU forgets how often",
        POLICIES + "eviction.py",
        "return self.uses[block], self.turns",
        "return 0, self.turns",
    ),
    (
        "length-aware evicts prefixes first",
        POLICIES + "eviction.py",
        "return self.uses[block], -self.depths[block], self.turns",
        "return self.uses[block], self.depths[block], self.turns",
    ),
    (
        "chunks a quarter as long",
        POLICIES + "batching.py",
        "end = min(request.input_tokens, start + chunk_tokens)",
        "end = min(request.input_tokens, start + chunk_tokens // 4)",
    ),
    (
        "chunked budget ignored",
        POLICIES + "batching.py",
        "        budget_tokens -= end - start",
        "        budget_tokens -= (end - start) // 2",
    ),
    (
        "replication of what is used least",
        POLICIES + "replication.py",
        "heapq.nlargest(",
        "heapq.nsmallest(",
    ),
    (
        "stale reports: the placed are forgotten",
        "reference_cluster/reports.py",
        "self.queued_s[placement.prefill] += prefill_s",
        "self.queued_s[placement.prefill] += 0.0",
    ),
)


def gate(directory: Path, python: str, hash_seed: str = "0") -> tuple[int, str, float]:
    """(exit code, last line, seconds) of the project's own gate in a copy of it."""
    env = {**os.environ, "PYTHONPATH": str(directory), "PYTHONHASHSEED": hash_seed}
    start = time.perf_counter()
    done = subprocess.run(
        [python, *GATE], cwd=directory, env=env, capture_output=True, text=True, check=False
    )
    lines = (done.stdout.strip() or done.stderr.strip() or "silent").splitlines()
    return done.returncode, lines[-1], time.perf_counter() - start


def copied(directory: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    for package in PACKAGES:
        shutil.copytree(REPO / package, directory / package, ignore=ignored)
    shutil.copytree(REPO / "tests/golden", directory / "tests/golden")
    return directory


def mutate(directory: Path, python: str) -> tuple[int, int]:
    """(seen, tried); each line is put back after its run."""
    seen = 0
    for what, file, old, new in MUTATIONS:
        path = directory / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file} has not one {old!r}: mend the list"
        path.write_text(text.replace(old, new, 1))
        code, said, seconds = gate(directory, python)
        path.write_text(text)
        seen += code == 99
        sys.stdout.write(f"{'seen' if code == 99 else 'MISSED'} {seconds:4.1f} s  {what}: {said}\n")
        sys.stdout.flush()
    return seen, len(MUTATIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", action="append", default=[])
    parser.add_argument("--only-mutations", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = copied(Path(scratch))
        alarms = []
        pythons = [sys.executable, *(str(Path(one).absolute()) for one in given.python)]
        for python in pythons if not given.only_mutations else []:
            for hash_seed in HASH_SEEDS:
                code, said, seconds = gate(directory, python, hash_seed)
                alarms.append(code != 0)
                sys.stdout.write(f"{code} {seconds:4.1f} s  {python} seed {hash_seed}: {said}\n")
                sys.stdout.flush()
        seen, tried = mutate(directory, sys.executable)
    sys.stdout.write(f"false alarms {sum(alarms)} of {len(alarms)}; seen {seen} of {tried}\n")
    sys.exit(seen < tried or any(alarms))


if __name__ == "__main__":
    main()
