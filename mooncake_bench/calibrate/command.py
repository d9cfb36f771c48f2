"""What is typed to calibrate? `mooncake-bench calibrate --url URL --out profile.toml`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from mooncake_bench.calibrate.fit import Points
    from mooncake_bench.calibrate.probe import ProbePlan

results = Console()
diagnostics = Console(stderr=True)


def calibrate(
    out: Annotated[Path, typer.Option(help="the profile to write, a .toml file")],
    url: Annotated[
        str | None, typer.Option(help="an OpenAI-compatible endpoint that nobody else uses")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="or the directory of a replay against one of our clusters")
    ] = None,
    engine: Annotated[
        Path | None, typer.Option(help="or a cluster's configuration, whose torch engine runs here")
    ] = None,
    base: Annotated[
        str, typer.Option(help="profile that has the sizes: layers, KV bytes, memory, links")
    ] = "tiny-torch-cpu",
    model: Annotated[str | None, typer.Option(help="the endpoint's name of the model")] = None,
    lengths: Annotated[
        str, typer.Option(help="prompts to probe, tokens")
    ] = "64,256,1024,2048,4096",
    batches: Annotated[str, typer.Option(help="decode batches to probe")] = "1,2,4,8",
    contexts: Annotated[str, typer.Option(help="their contexts, tokens")] = "64,1024",
    repeats: Annotated[int, typer.Option(min=1, help="of each probe; its median counts")] = 5,
    seed: Annotated[int, typer.Option(help="of the prompts")] = 0,
) -> None:
    """Measure an endpoint, a run or an engine, fit the cost model, write a profile with its error.

    Probes ask one thing at a time of an endpoint that nobody else uses. A run has the costs that a
    load had, with what the processes of one host take from each other. An engine in this process
    has no HTTP and no hand-over.
    """
    from mooncake_bench.calibrate.fit import as_toml, fitted_profile
    from mooncake_bench.calibrate.probe import ProbePlan
    from reference_cluster.cost_model import load_profile

    sizes = load_profile(base)
    plan = ProbePlan(
        lengths=numbers(lengths),
        batches=numbers(batches),
        contexts=numbers(contexts),
        repeats=repeats,
        seed=seed,
    )
    what, points = measured(url, run, engine, plan, model)
    source = f"{what}: {len(points.prefills)} prefills, {len(points.decodes)} decode batches"
    profile = fitted_profile(sizes, out.stem, source, points)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(as_toml(profile), encoding="utf-8")
    results.print(f"{out}: {profile.error}", highlight=False, soft_wrap=True)


def measured(
    url: str | None, run: Path | None, engine: Path | None, plan: ProbePlan, model: str | None
) -> tuple[str, Points]:
    """What was measured, in words, and its points."""
    if url is not None and run is None and engine is None:
        from mooncake_bench.calibrate.probe import probe

        with diagnostics.status(f"probing {url}"):
            return f"probes of {url}", asyncio.run(probe(url, plan, model))
    if run is not None and url is None and engine is None:
        from mooncake_bench.calibrate.served import served
        from mooncake_bench.records import read_run

        return f"the run {run.name}", served(read_run(run))
    if engine is not None and url is None and run is None:
        from mooncake_bench.calibrate.alone import alone

        with diagnostics.status(f"running the engine of {engine}"):
            return f"the engine of {engine.name} alone", alone(engine, plan)
    raise typer.BadParameter("give one of --url, --run and --engine")


def numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise typer.BadParameter(f"{text!r} is not a list of positive numbers, like 64,256")
    return found
