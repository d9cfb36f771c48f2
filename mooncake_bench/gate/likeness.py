"""May these runs be compared? Not with another trace, seed, jitter or machine, unless forced."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec

from mooncake_bench.gate.errors import GateError, Invalid
from mooncake_bench.gate.evidence import Evidence
from mooncake_bench.records import RunInfo

# Options of a replay that say where, not what.
WHERE = ("url", "out", "name", "model", "salt", "search", "target")


def _trace(info: RunInfo) -> Any:
    trace = info.trace
    return [trace.get(key) for key in ("sha256", "transforms", "speed", "block_tokens")]


def _options(info: RunInfo) -> Any:
    replay = info.config.get("replay", {})
    names = [name for name in replay if name not in WHERE and not name.startswith("search_")]
    return {name: replay[name] for name in names}


def _machine(info: RunInfo) -> Any:
    memory = info.machine.get("memory_bytes")
    # The same kind of virtual machine has a few KiB more or less.
    rounded = {"memory_gib": round(memory / 2**30)} if isinstance(memory, int) else {}
    return {**info.machine, "memory_bytes": None, **rounded}


def _bounds(info: RunInfo) -> Any:
    return msgspec.to_builtins([info.slo, info.slo_by_class, info.measured_s])


# What must be alike, by the word that allows it to differ.
ASPECTS: dict[str, tuple[str, Callable[[RunInfo], Any]]] = {
    "trace": ("other traces", _trace),
    "seed": ("other seeds", lambda info: info.seed),
    "jitter": ("jittered and unjittered arrivals", lambda info: bool(info.trace.get("jittered"))),
    "slo": ("other SLOs or warm-ups", _bounds),
    "source": ("other kinds of runs", lambda info: [info.source == "simulated"]),
    "options": ("other replay options", _options),
    "machine": ("other machines", _machine),
    "versions": ("other versions of the tool", lambda info: info.versions),
}
LIVE_ONLY = ("options", "machine", "versions")


def check_alike(
    baseline: Sequence[Evidence], candidate: Sequence[Evidence], allowed: Collection[str]
) -> list[str]:
    """Raise GateError where one side is of mixed versions, Invalid where runs may not be compared.

    Returns what differs and was allowed to, in words.
    """
    unknown = next((word for word in allowed if word not in (*ASPECTS, "all")), None)
    if unknown is not None:
        raise GateError(f"--allow {unknown}: there are {', '.join(ASPECTS)} and all")
    for side in (baseline, candidate):
        _one_version(side)
    first, remarks = baseline[0], []
    for word, (what, of) in ASPECTS.items():
        if word in LIVE_ONLY and first.is_simulated:
            continue
        other = next((one for one in (*baseline, *candidate) if not _same(of, first, one)), None)
        if other is None:
            continue
        if word not in allowed and "all" not in allowed:
            raise Invalid(
                f"{first.name} and {other.name} are of {what} ({_difference(of, first, other)}); "
                f"run both alike, or force it with --allow {word}"
            )
        remarks.append(f"Forced: {first.name} and {other.name} are of {what}.")
    return remarks


def check_valid(runs: Sequence[Evidence]) -> None:
    """Raise Invalid for a run whose numbers may not be believed."""
    for one in runs:
        if one.info is not None and not one.info.valid:
            reasons = "; ".join(one.info.invalid_reasons) or "no reason given"
            raise Invalid(f"{one.name} is an invalid run ({reasons}); run it again")


def _same(of: Callable[[RunInfo], Any], one: Evidence, other: Evidence) -> bool:
    assert one.info is not None
    assert other.info is not None
    return bool(of(one.info) == of(other.info))


def _one_version(side: Sequence[Evidence]) -> None:
    for one in side[1:]:
        if not _same(lambda info: info.versions, side[0], one):
            raise GateError(
                f"{side[0].name} and {one.name} are runs of one side by mixed versions "
                f"({_difference(lambda info: info.versions, side[0], one)}); make them anew"
            )


def _difference(of: Callable[[RunInfo], Any], one: Evidence, other: Evidence) -> str:
    """The first part that differs, old and new."""
    assert one.info is not None
    assert other.info is not None
    old, new = of(one.info), of(other.info)
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key))
        return f"{key} {old.get(key)} and {new.get(key)}"
    if isinstance(old, list) and isinstance(new, list):
        old, new = next(pair for pair in zip(old, new, strict=True) if pair[0] != pair[1])
    return f"{_short(old)} and {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
