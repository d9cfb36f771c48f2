"""Where does a tier-1 baseline live? In a directory of two files that can be committed.

`baseline.json` has every scenario as written and its numbers, to be read in a diff;
`decisions.parquet` has what was decided about every request, so that the first change has a name.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import polars as pl

from mooncake_bench.gate.errors import GateError
from mooncake_bench.gate.evidence import DECISIONS
from mooncake_bench.gate.scenarios import Outcome
from mooncake_bench.records import installed_versions

SCHEMA_VERSION = 1
NUMBERS, ROWS = "baseline.json", "decisions.parquet"


class Golden(msgspec.Struct, frozen=True):
    """What baseline.json holds. `versions` are of the packages that recorded it."""

    schema_version: int
    versions: dict[str, str]
    scenarios: list[Outcome]


def is_golden(path: Path) -> bool:
    return (path / NUMBERS).exists()


def write_golden(outcomes: list[Outcome], directory: Path) -> None:
    """Write both files; raises GateError where that cannot be done."""
    frames = [
        one.evidence.decisions.select(pl.lit(one.scenario.name).alias("scenario"), *DECISIONS)
        for one in outcomes
    ]
    bare = [msgspec.structs.replace(one, decisions=[]) for one in outcomes]
    versions = installed_versions(("mooncake-bench", "numpy", "polars"))
    golden = Golden(SCHEMA_VERSION, versions, bare)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        pl.concat(frames, how="vertical_relaxed").write_parquet(
            directory / ROWS, compression="zstd", compression_level=19
        )
        text = msgspec.json.format(msgspec.json.encode(golden, order="sorted"), indent=1)
        (directory / NUMBERS).write_bytes(text + b"\n")
    except OSError as error:
        raise GateError(f"{directory}: cannot write the baseline ({error.strerror})") from None


def read_golden(directory: Path) -> dict[str, Outcome]:
    """The outcomes by scenario; raises GateError for what is missing, broken or too new."""
    path = directory / NUMBERS
    try:
        golden = msgspec.json.decode(path.read_bytes(), type=Golden)
        rows = pl.read_parquet(directory / ROWS, glob=False)
    except FileNotFoundError as error:
        raise GateError(
            f"{error.filename or directory}: no such file; make the baseline with "
            f"`gate record --scenarios FILE --to {directory}`"
        ) from None
    except (msgspec.DecodeError, pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise GateError(f"{directory}: broken baseline ({reason}); record it again") from None
    if golden.schema_version > SCHEMA_VERSION:
        raise GateError(
            f"{path}: schema version {golden.schema_version}, but this mooncake-bench reads up to "
            f"{SCHEMA_VERSION}; upgrade it"
        )
    by_scenario = dict(rows.group_by("scenario", maintain_order=True).__iter__())
    found = {}
    for one in golden.scenarios:
        frame = by_scenario.get((one.scenario.name,))
        decisions = [] if frame is None else frame.select(DECISIONS).rows()
        found[one.scenario.name] = msgspec.structs.replace(one, decisions=decisions)
    return found
