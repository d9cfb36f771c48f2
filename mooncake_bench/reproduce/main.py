"""From names of figures to a page: plan, run what is missing, judge, write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mooncake_bench.reproduce.catalogue import chosen
from mooncake_bench.reproduce.experiment import Experiment
from mooncake_bench.reproduce.page import Finding, write_json, write_page
from mooncake_bench.reproduce.plan import Job, Sources
from mooncake_bench.reproduce.progress import Progress
from mooncake_bench.reproduce.runner import Result, load_results, run_all

PAGE, DATA, RUNS = "reproduce.html", "reproduce.json", "runs"


def reproduce(
    names: Sequence[str],
    traces: Path | None,
    out: Path,
    workers: int,
    on_progress: Callable[[Progress], None],
) -> list[Finding]:
    """Run the named figures (all if none is) and write page and JSON to `out`.

    What an earlier call has left in `out` is not run again. Raises ReproduceError, TraceError.
    """
    experiments = chosen(names)
    sources = Sources(traces)
    jobs, titles = planned(experiments, sources)
    results = load_results(out / RUNS, jobs.values())
    total = len(jobs)
    for count, digest in enumerate(results, start=1):
        on_progress(Progress(count, total, titles[digest], results[digest]["cpu_s"], False))

    def done(job: Job, result: Result) -> None:
        results[job.digest] = result
        name = titles[job.digest]
        on_progress(Progress(len(results), total, name, result["cpu_s"], True))

    left = [job for job in jobs.values() if job.digest not in results]
    if left:
        run_all(left, out / RUNS, workers, done)
    findings = [judged(one, sources, results) for one in experiments]
    write_page(findings, out / PAGE)
    write_json(findings, out / DATA)
    return findings


def planned(
    experiments: Sequence[Experiment], sources: Sources
) -> tuple[dict[str, Job], dict[str, str]]:
    """All runs by digest, each once however many figures need it, and what to call them.

    Runs of one workload follow each other: a worker reads a trace once.
    """
    jobs: dict[str, Job] = {}
    titles: dict[str, str] = {}
    for experiment in experiments:
        for name, plan in experiment.runs.items():
            job = sources.job(plan)
            jobs.setdefault(job.digest, job)
            titles.setdefault(job.digest, f"{experiment.name}: {name}")
    # The longest workloads first, so that no worker is left alone with one at the end.
    in_order = sorted(
        jobs.values(), key=lambda job: (is_small(job), job.source, str(job.plan.workload))
    )
    return {job.digest: job for job in in_order}, titles


def is_small(job: Job) -> bool:
    return not job.plan.workload.file


def judged(experiment: Experiment, sources: Sources, results: dict[str, Result]) -> Finding:
    """What the experiment's runs show."""
    found = {name: results[sources.job(plan).digest] for name, plan in experiment.runs.items()}
    values = {name: result["values"] for name, result in found.items()}
    outcome = experiment.judge(values, experiment.published)
    runs: list[tuple[str, dict[str, Any], float]] = [
        (name, msgspec.to_builtins(plan), found[name]["cpu_s"])
        for name, plan in experiment.runs.items()
    ]
    workloads = dict.fromkeys(sources.says(plan.workload) for plan in experiment.runs.values())
    return Finding(experiment, outcome, list(workloads), runs)
