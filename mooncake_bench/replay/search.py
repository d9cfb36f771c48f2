"""How much load does the endpoint take within its SLOs? Probes by bisection, each a whole run."""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from mooncake_bench import metrics
from mooncake_bench.records import Run
from mooncake_bench.replay.client import Progress
from mooncake_bench.replay.errors import ReplayError
from mooncake_bench.replay.options import ReplayOptions
from mooncake_bench.replay.overload import Overload
from mooncake_bench.replay.run import ReplayResult, measured_window, replay, write
from mooncake_bench.replay.schedule import plan
from mooncake_bench.slo import parse_slos, percent
from workloads.trace import Trace

BLOCKS = 20
Z95 = 1.959963984540054
REST_S = 2.0
"""After a probe that was stopped: the server may still work on what nobody waits for."""
OUT_OF_PROBE = ("out", "name", "salt", "search_from", "search_to", "search_precision")
"""Options that do not change what a probe at a given value is."""


class Probe(msgspec.Struct, frozen=True):
    """One run of a search: `value` is a speed, or a rate in requests/s.

    `low` and `high` bound the attainment at 95 % (`interval`); `holds` if it reached the target,
    `is_clear` if the target is outside of that interval. `stopped` says why it was cut short.
    """

    value: float
    speed: float
    rate_rps: float
    offered: int
    finished: int
    rejected: int
    failed: int
    attainment: float
    low: float
    high: float
    effective_requests: float
    goodput_rps: float
    ttft_p99_s: float | None
    holds: bool
    is_clear: bool
    valid: bool
    invalid_reasons: list[str]
    stopped: str
    salt: str
    directory: str
    reused: bool = False
    """Taken from an earlier, interrupted search."""


class SearchResult(msgspec.Struct, frozen=True):
    """What a search found. `capacity` is the highest value that held; None if the lowest did not.

    The true one is below `not_at`, the lowest value that did not hold (None: all did).
    """

    kind: str
    target: float
    capacity: float | None
    not_at: float | None
    sentence: str
    valid: bool
    probes: list[Probe]


class SearchInterrupted(Exception):  # noqa: N818  # no error: somebody pressed Ctrl-C
    """Ctrl-C during a probe; the probes before it are kept and used by the next search."""


def bisect(
    probe: Callable[[float], Probe], low: float, high: float, precision: float
) -> list[Probe]:
    """Probe the bounds, then halve (geometrically) the ratio between what held and what did not.

    Ends when the bounds are within `precision`, at once where the lowest does not hold or the
    highest does, and at a probe that says nothing: one that failed because of the client.
    """
    assert 0.0 < low < high
    probes = [probe(low)]
    if not probes[0].holds:
        return probes
    probes.append(probe(high))
    if probes[-1].holds:
        return probes
    while high / low > 1.0 + precision and says_something(probes[-1]):
        middle = float(f"{math.sqrt(low * high):.4g}")
        if not low < middle < high:
            break
        probes.append(probe(middle))
        low, high = (middle, high) if probes[-1].holds else (low, middle)
    return probes


def says_something(probe: Probe) -> bool:
    """Whether the probe tells of the endpoint: a late client can only make it look worse."""
    return probe.valid or probe.holds


def says(probe: Probe, target: float) -> str:
    """A probe in one line, for whoever watches."""
    outcome = "holds" if probe.holds else "does not hold"
    doubt = "" if probe.is_clear else f" (too close to {percent(target)} to tell)"
    why = f"; stopped early: {probe.stopped}" if probe.stopped else ""
    again = " (from before)" if probe.reused else ""
    return (
        f"{probe.value:g}{again}: {percent(probe.attainment)} of {probe.offered} requests, "
        f"{percent(probe.low)} to {percent(probe.high)}: {outcome}{doubt}{why}"
    )


def conclude(kind: str, target: float, probes: list[Probe]) -> SearchResult:
    """What the probes come to, in numbers and in one sentence."""
    held = max((one.value for one in probes if one.holds), default=None)
    missed = min((one.value for one in probes if not one.holds), default=None)
    unit = "x" if kind == "speed" else " req/s"
    useless = [one for one in probes if not says_something(one)]
    goal = f"{percent(target)} of requests within their SLOs"
    if useless:
        sentence = (
            f"No capacity: the client gave in at {useless[0].value:g}{unit}. "
            + useless[0].invalid_reasons[0]
        )
    elif held is None:
        sentence = f"Below {missed:g}{unit}: already there fewer than {goal}; lower --search-from."
    elif missed is None:
        sentence = (
            f"At least {held:g}{unit}: {goal} all the way; raise --search-to to find where not."
        )
    else:
        unclear = [one for one in probes if not one.is_clear]
        doubt = (
            f" {len(unclear)} of {len(probes)} probes were too close to the target to tell "
            "with so few requests; use a longer trace."
            if unclear
            else ""
        )
        sentence = f"Capacity {held:g}{unit}: {goal} there, no longer at {missed:g}{unit}.{doubt}"
    return SearchResult(kind, target, held, missed, sentence, not useless, probes)


# ---- intervals -------------------------------------------------------------------------------


def interval(met: npt.NDArray[np.bool_], blocks: int = BLOCKS) -> tuple[float, float, float]:
    """(low, high, effective requests): Wilson's 95 % interval for the share of `met`.

    `met` is in order of arrival. Requests that queue behind one another miss together, so they
    count for fewer than they are: by as much as the shares of `blocks` consecutive parts of the
    run vary more than those of independent requests would (the design effect, at least 1).
    """
    count = len(met)
    if not count:
        return 0.0, 1.0, 0.0
    share = float(met.mean())
    effect = 1.0
    blocks = min(blocks, count // 2)
    if blocks >= 2 and 0.0 < share < 1.0:
        parts = np.array([part.mean() for part in np.array_split(met, blocks)])
        effect = max(1.0, float(parts.var(ddof=1)) * (count / blocks) / (share * (1.0 - share)))
    effective = count / effect
    return *wilson(share, effective), effective


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's score interval at 95 % for a share among `count` independent requests."""
    square = Z95 * Z95
    middle = (share + square / (2 * count)) / (1 + square / count)
    root = math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    half = Z95 / (1 + square / count) * root
    return max(0.0, middle - half), min(1.0, middle + half)


# ---- probes as runs --------------------------------------------------------------------------


def search(
    trace: Trace,
    url: str,
    options: ReplayOptions,
    on_probe: Callable[[Probe], None] | None = None,
    on_progress: Callable[[float, Progress], None] | None = None,
) -> SearchResult:
    """Search as `options` say; a run directory a probe under `options.out`, and search.json.

    Probes of an interrupted search with the same options are used again. Every probe has a salt of
    its own, so that none warms the cache for the next. Raises ReplayError, SearchInterrupted.
    """
    if options.search == "rate" and trace.rate_rps <= 0:
        raise ReplayError("--search rate: all requests arrive at once; add --arrivals poisson")
    directory = Path(options.out)
    nonce = secrets.token_hex(4)
    probes: list[Probe] = []

    def probe(value: float) -> Probe:
        one = _probe(trace, url, options, value, f"{nonce}-{len(probes)}", on_progress)
        probes.append(one)
        # After every probe: what is known so far outlives whatever happens next.
        _write(conclude(str(options.search), options.target, probes), directory)
        if on_probe is not None:
            on_probe(one)
        return one

    found = bisect(probe, options.search_from, options.search_to, options.search_precision)
    result = conclude(str(options.search), options.target, found)
    _write(result, directory)
    return result


def _probe(
    trace: Trace,
    url: str,
    options: ReplayOptions,
    value: float,
    nonce: str,
    on_progress: Callable[[float, Progress], None] | None,
) -> Probe:
    directory = Path(options.out) / f"{options.search}-{value:g}"
    key = _key(trace, url, options, value)
    if (earlier := _earlier(directory, key)) is not None:
        return earlier
    salt = nonce if options.salt in ("none", "run") else f"{options.salt}-{nonce}"
    speed = value if options.search == "speed" else value / trace.rate_rps
    mine = msgspec.structs.replace(
        options, speed=speed, salt=salt, search="", name=f"{options.search} {value:g}"
    )
    result = replay(
        trace,
        url,
        mine,
        (lambda progress: on_progress(value, progress)) if on_progress else None,
        monitor=_overload(trace, mine),
    )
    if result.interrupted:
        raise SearchInterrupted(f"interrupted at {options.search} {value:g}")
    run = write(result, trace, mine, directory)
    found = _as_probe(run, result, value, mine, options.target)
    _write_whole(directory / "probe.json", {"key": key, "probe": found})
    if result.stopped:
        time.sleep(REST_S)
    return found


def _overload(trace: Trace, options: ReplayOptions) -> Overload:
    slo, by_class = parse_slos(options.slo)
    whole = plan(trace.frame, options.speed, waits_for_answers=options.sessions)
    last_s = float(whole.due_s[-1])
    window_s = measured_window(options, last_s) or (0.0, math.inf)
    return Overload(whole, slo, by_class, options.target, window_s)


def _as_probe(
    run: Run, result: ReplayResult, value: float, options: ReplayOptions, target: float
) -> Probe:
    frame = metrics.measured(metrics.per_request(run.requests, run.spans), run.info.measured_s)
    met = metrics.attained(frame.sort("arrival_s"), run.info.slo, run.info.slo_by_class)
    low, high, effective = interval(met.to_numpy())
    attainment = float(met.mean() or 0.0) if met.len() else 0.0  # type: ignore[arg-type]  # a bool column's mean
    summary = run.summary
    return Probe(
        value=value,
        speed=options.speed,
        rate_rps=float(run.info.trace["rate_rps"]),
        offered=summary["offered"],
        finished=summary["finished"],
        rejected=summary["rejected"],
        failed=summary["failed"],
        attainment=attainment,
        low=low,
        high=high,
        effective_requests=effective,
        goodput_rps=summary["goodput_rps"] or 0.0,
        ttft_p99_s=summary["ttft_s"]["p99"],
        holds=attainment >= target and not result.stopped,
        is_clear=bool(result.stopped) or not low <= target <= high,
        # A probe that was stopped because it was over is a result, not a spoilt one.
        valid=not result.spoilt,
        invalid_reasons=result.spoilt,
        stopped=result.stopped,
        salt=options.salt,
        directory=str(run.directory),
    )


def _key(trace: Trace, url: str, options: ReplayOptions, value: float) -> str:
    """The same for probes that would be the same run."""
    values: dict[str, Any] = msgspec.to_builtins(options)
    same = {name: one for name, one in values.items() if name not in OUT_OF_PROBE}
    text = msgspec.json.encode([same, url, value, trace.sha256, trace.transforms], order="sorted")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


class _Kept(msgspec.Struct):
    key: str
    probe: Probe


def _earlier(directory: Path, key: str) -> Probe | None:
    try:
        kept = msgspec.json.decode((directory / "probe.json").read_bytes(), type=_Kept)
    except (OSError, msgspec.DecodeError):
        return None
    is_usable = kept.key == key and says_something(kept.probe)
    return msgspec.structs.replace(kept.probe, reused=True) if is_usable else None


def _write(result: SearchResult, directory: Path) -> None:
    _write_whole(directory / "search.json", result)


def _write_whole(path: Path, value: object) -> None:
    """Write JSON; the file has its name only when it is whole. Raises ReplayError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
        partial.replace(path)
    except OSError as error:
        raise ReplayError(f"{path}: cannot be written ({error.strerror}); check --out") from None
