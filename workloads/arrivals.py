"""When do requests arrive, if not as the trace says? Other arrival processes, for any trace."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import polars as pl

from workloads.errors import TraceError
from workloads.model import Floats, Random, Trace, seeded

DEFAULT_BURSTINESS = 1.0
"""Shape of the gamma distribution of gaps, as vLLM's flag: 1 is Poisson, less comes in bursts."""


def arrivals(trace: Trace, spec: str, seed: int) -> Trace:
    """The same requests in the same order, arriving as `spec` says; "trace" changes nothing.

    `constant`, `poisson` and `gamma` take `rate_rps` (default: the trace's own), gamma also
    `burstiness`; `ramp` takes `from_rps` and `to_rps` and rises (or falls) evenly over time. Like
    `poisson:rate_rps=5`. The first request arrives at 0 where gaps are constant, after a gap where
    they are drawn. Times are on a nanosecond grid. Raises TraceError.
    """
    name, _, text = spec.partition(":")
    if name == "trace" and not text:
        return trace
    if name not in PROCESSES:
        raise TraceError(f"arrivals {spec!r}: unknown; use trace, {', '.join(PROCESSES)}")
    draw, defaults = PROCESSES[name]
    values = _values(spec, text, defaults)
    if values.get("rate_rps") == 0.0:
        values["rate_rps"] = trace.rate_rps
    for key, value in values.items():
        if not (math.isfinite(value) and value > 0.0):
            remedy = (
                "a number above 0" if trace.rate_rps or key != "rate_rps" else "a rate of its own"
            )
            raise TraceError(f"arrivals {spec!r}: {key} is {value:g}; give it {remedy}")
    times = draw(trace.frame.height, values, seeded(seed))
    moved = pl.Series("arrival_s", np.rint(times * 1e9) / 1e9)
    shown = ", ".join(f"{key} {value:.6g}" for key, value in values.items())
    # Turns that wait for answers still do: only those that do not wait have times of their own.
    what = f"{name} arrivals, {shown}" + ("" if name in ("constant", "ramp") else f", seed {seed}")
    return trace.changed(trace.frame.with_columns(moved), what)


def constant(count: int, values: dict[str, float], random: Random) -> Floats:
    """Arrival times, seconds: really constant gaps."""
    return np.arange(count) / values["rate_rps"]


def poisson(count: int, values: dict[str, float], random: Random) -> Floats:
    """Arrival times, seconds: exponential gaps."""
    return np.cumsum(-np.log1p(-random.random(count))) / values["rate_rps"]


def gamma(count: int, values: dict[str, float], random: Random) -> Floats:
    """Arrival times, seconds: gaps of a gamma distribution; their CV is burstiness ** -0.5."""
    shape = values["burstiness"]
    return np.cumsum(gamma_draws(count, shape, random)) / (shape * values["rate_rps"])


def ramp(count: int, values: dict[str, float], random: Random) -> Floats:
    """Arrival times, seconds: the rate goes evenly from one value to the other by the last."""
    low, high = values["from_rps"], values["to_rps"]
    number = np.arange(count, dtype=np.float64)
    if low == high:
        return number / low
    # low t + (high - low) t^2 / 2T = number, with T the time of all: 2 (count - 1) / (low + high).
    span_s = max(2.0 * (count - 1) / (low + high), 1e-9)
    steep = (high - low) / span_s
    return (np.sqrt(low * low + 2.0 * steep * number) - low) / steep


def gamma_draws(count: int, shape: float, random: Random) -> Floats:
    """Gamma variates of scale 1 (Marsaglia and Tsang 2000), from `random.random()` alone.

    numpy's own generators may change with its version; uniform numbers do not.
    """
    boost = 1.0 + shape if shape < 1.0 else shape
    d = boost - 1.0 / 3.0
    found: list[Floats] = []
    missing = count
    while missing > 0:
        tries = missing + missing // 8 + 8
        u, v, w = random.random(tries), random.random(tries), random.random(tries)
        normal = np.sqrt(-2.0 * np.log1p(-u)) * np.cos(2.0 * np.pi * v)
        cube = (1.0 + normal / np.sqrt(9.0 * d)) ** 3
        with np.errstate(invalid="ignore", divide="ignore"):
            limit = 0.5 * normal**2 + d * (1.0 - cube + np.log(cube))
            good = (cube > 0.0) & (np.log1p(-w) < limit)
        found.append(d * cube[good][:missing])
        missing -= len(found[-1])
    draws = np.concatenate(found)
    if shape < 1.0:
        draws = draws * (1.0 - random.random(count)) ** (1.0 / shape)
    return draws


Draw = Callable[[int, dict[str, float], Random], Floats]
PROCESSES: dict[str, tuple[Draw, dict[str, float]]] = {
    # A rate of 0 stands for the trace's own.
    "constant": (constant, {"rate_rps": 0.0}),
    "poisson": (poisson, {"rate_rps": 0.0}),
    "gamma": (gamma, {"rate_rps": 0.0, "burstiness": DEFAULT_BURSTINESS}),
    "ramp": (ramp, {"from_rps": 0.0, "to_rps": 0.0}),
}


def _values(spec: str, text: str, defaults: dict[str, float]) -> dict[str, float]:
    values = dict(defaults)
    for part in filter(None, text.split(",")):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in defaults:
            raise TraceError(f"arrivals {spec!r}: {key!r} is unknown; use {', '.join(defaults)}")
        try:
            values[key] = float(value)
        except ValueError:
            raise TraceError(f"arrivals {spec!r}: {part!r} is no number; write {key}=5") from None
        if values[key] <= 0.0:
            raise TraceError(f"arrivals {spec!r}: {key} must be above 0; write {key}=5")
    return values
