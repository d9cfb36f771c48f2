"""What is an experiment? Runs, and a pure function that puts their results beside the paper's."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from mooncake_bench.reproduce.outcome import Outcome
from mooncake_bench.reproduce.plan import Plan

Published = Mapping[str, Any]
Values = Mapping[str, Mapping[str, Any]]  # By the name of the run: what `work.do` left.


@dataclass(frozen=True, slots=True)
class Experiment:
    """A figure of a paper: what it shows, how it is run here, and how to judge it."""

    name: str
    title: str
    text: str  # What was measured, and with which configuration.
    runs: Mapping[str, Plan]
    judge: Callable[[Values, Published], Outcome]

    @property
    def published(self) -> Published:
        """The paper's numbers with their `source`; empty where there are none."""
        found: Published = published().get(self.name, {})
        return found


@cache
def published() -> dict[str, Any]:
    """All of published.toml, by name of the figure."""
    file = resources.files("mooncake_bench.reproduce").joinpath("published.toml")
    return tomllib.loads(file.read_text(encoding="utf-8"))
