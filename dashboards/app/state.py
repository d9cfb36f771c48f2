"""What is being looked at? The address says it all, so that it can be sent to somebody else."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode

from mooncake_bench.explore import TBT_STATISTICS
from mooncake_bench.slo import Slo

TIMES = {
    "ttft_s": "TTFT",
    "tbt_s": "TBT",
    "tpot_s": "TPOT",
    "e2e_s": "end to end",
}
MEASURES = {
    "load": ("load", "share of the SLO"),
    "queue": ("waiting requests", "requests"),
    "running": ("running requests", "requests"),
    "context_tokens": ("context in the batch", "tokens"),
}
SORTS = ("run", "attainment", "goodput", "ttft", "tbt", "offered", "started")
THEMES = ("auto", "light", "dark")


@dataclass(frozen=True, slots=True)
class State:
    """The query of an address; what is not in it has these defaults.

    `ttft` (seconds) and `tbt` (milliseconds) of 0 leave each run its own bounds.
    """

    runs: str = ""
    ttft: float = 0.0
    tbt: float = 0.0
    stat: str = "tbt_s"
    time: str = "ttft_s"
    by: str = "input_tokens"
    measure: str = "load"
    sort: str = "run"
    find: str = ""
    run: str = ""
    request: int = -1
    plan: str = ""
    theme: str = "auto"

    @classmethod
    def of(cls, search: str | None) -> Self:
        """Read `?runs=a,b&ttft=10`; what makes no sense is as if it were not there."""
        given = dict(parse_qsl((search or "").removeprefix("?")))
        values: dict[str, Any] = {}
        for field in fields(cls):
            if field.name in given:
                value = _read(field.name, given[field.name], field.default)
                if value is not None:
                    values[field.name] = value
        return cls(**values)

    @property
    def search(self) -> str:
        """The query: only what differs from the defaults."""
        default = type(self)()
        given = {
            field.name: _written(getattr(self, field.name))
            for field in fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        }
        return f"?{urlencode(given, safe=',/')}" if given else ""

    def with_(self, **changes: Any) -> State:
        """The same but for these; values as controls give them."""
        default = type(self)()
        read = {
            name: _read(name, "" if value is None else str(value), getattr(default, name))
            for name, value in changes.items()
        }
        return replace(self, **{name: value for name, value in read.items() if value is not None})

    def slo(self, own: Slo) -> Slo:
        """The bounds chosen, or a run's own."""
        return Slo(self.ttft or own.ttft_s, round(self.tbt / 1e3, 12) or own.tbt_s)

    @property
    def is_own_slo(self) -> bool:
        return not self.ttft and not self.tbt

    @property
    def chosen(self) -> list[str]:
        return [key for key in self.runs.split(",") if key]


CHOICES: dict[str, tuple[str, ...]] = {
    "stat": tuple(TBT_STATISTICS),
    "time": tuple(TIMES),
    "by": ("input_tokens", "reused_tokens"),
    "measure": tuple(MEASURES),
    "sort": SORTS,
    "theme": THEMES,
}


def _read(name: str, text: str, default: Any) -> Any:
    if name in CHOICES:
        return text if text in CHOICES[name] else None
    if isinstance(default, str):
        return text[:2000]
    try:
        number = float(text or default)
    except ValueError:
        return None
    if not math.isfinite(number) or abs(number) > 1e12:
        return None
    return int(number) if isinstance(default, int) else max(0.0, number)


def _written(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)
