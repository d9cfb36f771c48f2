"""What is typed to calibrate? `mooncake-bench calibrate --url URL --out profile.toml`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

results = Console()
diagnostics = Console(stderr=True)


def calibrate(
    url: Annotated[str, typer.Option(help="an OpenAI-compatible endpoint that nobody else uses")],
    out: Annotated[Path, typer.Option(help="the profile to write, a .toml file")],
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
    """Probe an endpoint, fit the cost model, and write a profile that knows its error."""
    from mooncake_bench.calibrate import ProbePlan, as_toml, fitted_profile, probe
    from reference_cluster.cost_model import load_profile

    sizes = load_profile(base)
    plan = ProbePlan(
        lengths=numbers(lengths),
        batches=numbers(batches),
        contexts=numbers(contexts),
        repeats=repeats,
        seed=seed,
    )
    with diagnostics.status(f"probing {url}"):
        prefills, decodes = asyncio.run(probe(url, plan, model))
    profile = fitted_profile(sizes, out.stem, url, prefills, decodes)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(as_toml(profile), encoding="utf-8")
    results.print(f"{out}: {profile.error}", highlight=False, soft_wrap=True)


def numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise typer.BadParameter(f"{text!r} is not a list of positive numbers, like 64,256")
    return found
