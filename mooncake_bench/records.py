"""What a run leaves behind: which columns, in which files, and how they are read back."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import msgspec
import polars as pl

from mooncake_bench import metrics
from mooncake_bench.slo import Slo

SCHEMA_VERSION = 1
SOURCES = ("simulated", "live-modelled", "live-torch", "live-vllm", "external")
SYSTEMS = ("disaggregated", "colocated", "external")
STATUSES = ("finished", "rejected", "failed")

_FLOAT, _INT, _TEXT = pl.Float64(), pl.Int64(), pl.String()

# One row an offered request. Times are seconds since the run's start, null where it never
# happened; they do not decrease in the order given.
REQUESTS: dict[str, pl.DataType] = {
    "request": _INT,  # row number in the trace; never null
    "arrival_s": _FLOAT,  # when the trace wanted it sent; never null
    "sent_s": _FLOAT,  # when the client sent it; null when simulated
    "placed_s": _FLOAT,  # the Conductor chose its instances
    "fetched_s": _FLOAT,  # its remote prefix has arrived (placed_s if nothing was fetched)
    "prefill_start_s": _FLOAT,
    "prefill_end_s": _FLOAT,
    "transferred_s": _FLOAT,  # its KVCache is where it will be decoded
    "first_token_s": _FLOAT,
    "decode_start_s": _FLOAT,  # its first decode step begins
    "finished_s": _FLOAT,  # or was rejected, or failed
    "input_tokens": _INT,  # never null
    "output_tokens": _INT,  # produced (simulated) or received (live)
    "output_tokens_asked": _INT,
    "reused_tokens": _INT,  # of the input, not computed again; null if unknown
    "fetched_tokens": _INT,  # of the reused, brought from another instance
    "prefill_busy_s": _FLOAT,  # engine seconds its prefill took
    "predicted_ttft_s": _FLOAT,  # by the Conductor, when it placed the request
    "predicted_tbt_s": _FLOAT,
    "prefill": _TEXT,  # instance, like "prefill-3" or "colocated-2"
    "decode": _TEXT,  # instance, like "decode-0"; the same as `prefill` when colocated
    "status": _TEXT,  # finished | rejected | failed; never null
    "reason": _TEXT,  # why rejected or failed
    "http_status": _INT,
    "class": _TEXT,  # of the trace, for bounds of its own; null where the trace has none
    "attempts": _INT,  # sends of this one request, 1 without retries; null when simulated
    "retry_after_s": _FLOAT,  # what the last rejection asked for
    # The first of its KV left for its decode instance: not in the order above, for layer by layer
    # that is during the prefill.
    "transfer_start_s": _FLOAT,
    "prefix_replicas": _FLOAT,  # instances that held a block of its known prefix, mean over these
}
# Columns that runs of earlier versions lack; null there.
_SINCE_FIRST = (
    *("class", "attempts", "retry_after_s"),
    *("transfer_start_s", "prefix_replicas", "evicted_blocks"),
)

# Token times after the first token: token j (from 0) of a row is at
# start_s + (j + 1) first_gap_s + growth_s j (j + 1) / 2. Rows of a request are in time order.
SPANS: dict[str, pl.DataType] = {
    "request": _INT,
    "start_s": _FLOAT,
    "steps": _INT,  # tokens of the row, at least 1
    "first_gap_s": _FLOAT,
    "growth_s": _FLOAT,  # by how much each gap is longer than the one before
}

# What the server's /metrics said during the run; a row where a value has changed.
SERVER_METRICS: dict[str, pl.DataType] = {
    "time_s": _FLOAT,  # on the clock of the requests
    "name": _TEXT,
    "labels": _TEXT,  # as written: 'engine="0",model_name="x"'
    "value": _FLOAT,
}

# One row a chunk of a prompt that was computed in more than one, in time order. Other prompts are
# computed from prefill_start_s to prefill_end_s; without the file it is not known.
CHUNKS: dict[str, pl.DataType] = {
    "request": _INT,
    "start_s": _FLOAT,
    "end_s": _FLOAT,  # of a pipeline: of its first stage
    "tokens": _INT,
}

# How the uses of blocks lie apart, of the trace that was offered (`workloads.statistics.reuse`).
REUSE: dict[str, pl.DataType] = {
    "distance_blocks": _FLOAT,  # different blocks used since the last use of the same one
    "share": _FLOAT,  # of all uses of blocks, those with at most this distance
}

# One row an instance and sampling instant.
SAMPLES: dict[str, pl.DataType] = {
    "time_s": _FLOAT,
    "instance": _TEXT,
    "role": _TEXT,  # prefill | decode | colocated
    "load": _FLOAT,  # predicted TTFT or TBT over its SLO; 1.0 = at the limit
    "queue": _INT,  # requests waiting
    "running": _INT,
    "context_tokens": _INT,
    "pool_used_blocks": _INT,
    "pool_capacity_blocks": _INT,
    "link_bytes_per_s": _FLOAT,
    "evicted_blocks": _INT,  # so far; begins anew with the instance
}

_NEVER_NULL = {
    "requests": ("request", "arrival_s", "input_tokens", "status"),
    "spans": tuple(SPANS),
    "samples": ("time_s", "instance", "role"),
}
_SCHEMAS = {"requests": REQUESTS, "spans": SPANS, "samples": SAMPLES}
EXTRAS = {"server_metrics": SERVER_METRICS, "chunks": CHUNKS, "reuse": REUSE}
"""Tables that only some runs have."""

TBT_FILE = "tbt.parquet"


class RecordsError(ValueError):
    """A run that cannot be written or read; the message is one line with place and remedy."""


class RunInfo(msgspec.Struct, kw_only=True):
    """What was run, on what, and whether its numbers may be believed.

    `source` is one of SOURCES, `system` one of SYSTEMS. The report reads, where present:
    `trace` {name, sha256, jittered, transforms, block_tokens}, `config` (resolved, free shape),
    `profile` {name, source, error}, `client` {cpu: share of one core, ...}, `machine`
    (`fingerprint()`), `versions` (`installed_versions()`). `started_at` is an ISO time. Requests
    of a class in `slo_by_class` have its bounds instead of `slo`. With `measured_s` only requests
    that arrive in [start, end) count in the summary: the rest is warm-up and cool-down.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    source: str
    system: str
    trace: dict[str, Any] = msgspec.field(default_factory=dict)
    config: dict[str, Any] = msgspec.field(default_factory=dict)
    profile: dict[str, Any] = msgspec.field(default_factory=dict)
    slo: Slo = Slo()
    slo_by_class: dict[str, Slo] = msgspec.field(default_factory=dict)
    seed: int = 0
    versions: dict[str, Any] = msgspec.field(default_factory=dict)
    machine: dict[str, Any] = msgspec.field(default_factory=dict)
    valid: bool = True
    invalid_reasons: list[str] = msgspec.field(default_factory=list)
    warnings: list[str] = msgspec.field(default_factory=list)
    client: dict[str, Any] = msgspec.field(default_factory=dict)
    started_at: str = ""
    measured_s: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A finished or interrupted run: its description, its rows, and what they sum up to."""

    info: RunInfo
    requests: pl.DataFrame
    spans: pl.DataFrame
    samples: pl.DataFrame
    summary: dict[str, Any]
    directory: Path | None


def write_run(
    directory: Path,
    info: RunInfo,
    requests: pl.DataFrame,
    spans: pl.DataFrame | None = None,
    samples: pl.DataFrame | None = None,
    server_metrics: pl.DataFrame | None = None,
    chunks: pl.DataFrame | None = None,
    reuse: pl.DataFrame | None = None,
) -> Run:
    """Write the files of a run directory, whatever there is to write, and return the run.

    Beside its three tables, run.json and summary.json there is tbt.parquet: `metrics.request_tbt`,
    one row a request, so that whoever looks at the run need not go through its tokens again.
    With `server_metrics`, `chunks` and `reuse` (columns SERVER_METRICS, CHUNKS, REUSE) there are
    files of these names too.

    The frames are cast to REQUESTS, SPANS and SAMPLES: a missing column becomes null unless it may
    not be, an unknown one is an error. Every file is complete before any takes its final name.
    Raises RecordsError.
    """
    assert info.source in SOURCES, info.source
    assert info.system in SYSTEMS, info.system
    frames = {
        "requests": conform(requests, "requests"),
        "spans": conform(spans if spans is not None else pl.DataFrame(), "spans"),
        "samples": conform(samples if samples is not None else pl.DataFrame(), "samples"),
    }
    times = metrics.request_tbt(frames["requests"], frames["spans"])
    per_request = metrics.with_tbt(frames["requests"], times)
    summary = metrics.summarise_frame(info, per_request, frames["samples"])
    writers: dict[str, Callable[[IO[bytes]], Any]] = {
        f"{name}.parquet": frame.write_parquet for name, frame in frames.items()
    }
    writers[TBT_FILE] = times.write_parquet
    given = {"server_metrics": server_metrics, "chunks": chunks, "reuse": reuse}
    for name, frame in given.items():
        if frame is not None:
            writers[f"{name}.parquet"] = frame.cast(pl.Schema(EXTRAS[name])).write_parquet
    writers["summary.json"] = lambda file: file.write(_json(summary))
    writers["run.json"] = lambda file: file.write(_json(info))
    try:
        _write_all(directory, writers)
    except OSError as error:
        raise RecordsError(f"{directory}: cannot write the run ({error.strerror})") from error
    return Run(info=info, **frames, summary=summary, directory=directory)


def read_run(directory: Path) -> Run:
    """Read a run directory back; raises RecordsError for what is missing, broken or too new."""
    info = read_info(directory / "run.json")
    frames = {name: read_frame(directory / f"{name}.parquet", name) for name in _SCHEMAS}
    summary = read_object(directory / "summary.json")
    return Run(info=info, **frames, summary=summary, directory=directory)


def read_server_metrics(run: Run) -> pl.DataFrame:
    """What the server's /metrics said during the run, columns SERVER_METRICS; no rows if nothing.

    Raises RecordsError.
    """
    path = run.directory / "server_metrics.parquet" if run.directory is not None else None
    if path is None or not path.exists():
        return pl.DataFrame(schema=SERVER_METRICS)
    try:
        return pl.read_parquet(path, schema=SERVER_METRICS)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RecordsError(f"{path}: {_first_line(error)}") from error


def conform(frame: pl.DataFrame, table: str) -> pl.DataFrame:
    """Return `frame` with exactly the columns of `table` (requests, spans, samples), cast.

    NaN becomes null.
    Raises RecordsError naming the column that is unknown, missing, null or of another type.
    """
    schema = _SCHEMAS[table]
    unknown = [name for name in frame.columns if name not in schema]
    if unknown:
        raise RecordsError(f"{table}: unknown column {unknown[0]!r}; known are {', '.join(schema)}")
    if not frame.columns:
        return pl.DataFrame(schema=schema)
    # A producer that fills numpy arrays says NaN for "never happened".
    frame = frame.with_columns(pl.selectors.float().fill_nan(None))
    for name in _NEVER_NULL[table]:
        if name not in frame.columns:
            raise RecordsError(f"{table}: column {name!r} is missing; every row needs it")
        if frame[name].null_count():
            raise RecordsError(f"{table}: column {name!r} holds a null; every row needs it")
    columns = [
        pl.col(name) if name in frame.columns else pl.lit(None, dtype).alias(name)
        for name, dtype in schema.items()
    ]
    try:
        frame = frame.select(columns).cast(pl.Schema(schema))
    except pl.exceptions.PolarsError as error:
        raise RecordsError(f"{table}: {_first_line(error)}") from error
    if table == "requests":
        _check_statuses(frame)
    return frame


def fingerprint() -> dict[str, Any]:
    """The machine, as far as it explains a number: no host name, no user, no address."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": _cores_usable(),
        "memory_bytes": _memory_bytes(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def installed_versions(packages: tuple[str, ...] = ("mooncake-bench", "polars")) -> dict[str, str]:
    """The installed version of each package; those that are not installed are left out."""
    found: dict[str, str] = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _write_all(directory: Path, writers: Mapping[str, Callable[[IO[bytes]], Any]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    partial = {name: directory / f".{name}.{os.getpid()}.partial" for name in writers}
    try:
        for name, write in writers.items():
            with partial[name].open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        # All are whole before the first takes its name, and run.json comes last: a directory
        # with a run.json of this run has everything else of it too.
        for name in EXTRAS:
            if f"{name}.parquet" not in writers:
                (directory / f"{name}.parquet").unlink(missing_ok=True)  # Another run's.
        for name in writers:
            partial[name].replace(directory / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def read_info(path: Path) -> RunInfo:
    """Read a run.json; raises RecordsError."""
    data = read_object(path)
    version = data.get("schema_version")
    if not isinstance(version, int):
        raise RecordsError(f"{path}: no schema_version; is this a run of mooncake-bench?")
    if version > SCHEMA_VERSION:
        raise RecordsError(
            f"{path}: schema version {version}, but this mooncake-bench reads up to "
            f"{SCHEMA_VERSION}; upgrade it"
        )
    try:
        return msgspec.convert(data, RunInfo)
    except msgspec.ValidationError as error:
        raise RecordsError(f"{path}: {_first_line(error)}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run directory; raises RecordsError."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RecordsError(f"{path}: no such file; is {path.parent} a run directory?") from None
    except OSError as error:
        raise RecordsError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise RecordsError(f"{path}: broken JSON ({error}); run again to write it anew") from error
    if not isinstance(data, dict):
        raise RecordsError(f"{path}: not a JSON object; run again to write it anew")
    return data


def read_frame(path: Path, table: str) -> pl.DataFrame:
    """Read a file of one of the tables (requests, spans, samples); raises RecordsError."""
    try:
        frame = pl.read_parquet(path, glob=False)
    except FileNotFoundError:
        raise RecordsError(f"{path}: no such file; the run was not written to its end") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise RecordsError(
            f"{path}: truncated or not Parquet ({_first_line(error)}); run again to write it anew"
        ) from error
    known = [name for name in _SCHEMAS[table] if name in frame.columns]
    missing = [name for name in _SCHEMAS[table] if name not in (*known, *_SINCE_FIRST)]
    if missing:
        raise RecordsError(f"{path}: column {missing[0]!r} is missing; run again to write it anew")
    try:
        # Columns of a later minor version are left aside.
        return conform(frame.select(known), table)
    except RecordsError as error:
        raise RecordsError(f"{path}: {error}") from error


def _check_statuses(frame: pl.DataFrame) -> None:
    wrong = frame.filter(~pl.col("status").is_in(list(STATUSES)))
    if wrong.height:
        status, request = wrong["status"][0], wrong["request"][0]
        raise RecordsError(
            f"requests: status {status!r} of request {request} is not one of {', '.join(STATUSES)}"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cores_usable() -> int | None:
    # macOS has no affinity; there every core is usable.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_bytes() -> int | None:
    with contextlib.suppress(ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
