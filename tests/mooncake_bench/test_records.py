"""Does a run survive being written and read back, and is a broken one refused in one line?"""

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from mooncake_bench import records
from mooncake_bench.records import RecordsError, Run, RunInfo, read_run, write_run
from mooncake_bench.slo import Slo

ARun = Callable[..., Run]
INFO = RunInfo(name="a run", source="simulated", system="colocated")
ONE = pl.DataFrame({"request": [0], "arrival_s": [0.0], "input_tokens": [3], "status": ["failed"]})


def test_a_run_reads_back_as_it_was_written(a_run: ARun) -> None:
    """Info, rows and summary are the same after the way through the files."""
    run = a_run("run", requests=50, slo=Slo(2.0, 0.04), warnings=["a warning"])
    assert run.directory is not None
    again = read_run(run.directory)
    assert again.info == run.info
    assert again.summary == run.summary
    for name in ("requests", "spans", "samples"):
        assert_frame_equal(getattr(again, name), getattr(run, name))
    assert sorted(path.name for path in run.directory.iterdir()) == [
        "chunks.parquet",
        "requests.parquet",
        "reuse.parquet",
        "run.json",
        "samples.parquet",
        "spans.parquet",
        "summary.json",
        "tbt.parquet",
    ]


def test_what_exists_of_an_interrupted_run_is_kept(tmp_path: Path) -> None:
    """One failed request, no span, no sample: still a run; so is nothing at all."""
    run = write_run(tmp_path / "one", INFO, ONE)
    assert (run.summary["offered"], run.summary["failed"]) == (1, 1)
    assert read_run(tmp_path / "one").requests.columns == list(records.REQUESTS)
    nothing = write_run(tmp_path / "nothing", INFO, pl.DataFrame())
    assert nothing.summary["offered"] == 0
    assert nothing.summary["attainment"] is None
    assert read_run(tmp_path / "nothing").requests.height == 0


def test_another_run_s_extra_tables_do_not_stay(a_run: ARun) -> None:
    """Written over by a run without chunks and reuse distances, a directory has none."""
    directory = a_run("run", requests=20).directory
    assert directory is not None
    assert (directory / "chunks.parquet").is_file()
    write_run(directory, INFO, ONE)
    assert not (directory / "chunks.parquet").exists()
    assert not (directory / "reuse.parquet").exists()


def test_columns_are_cast_and_put_in_order(tmp_path: Path) -> None:
    """A producer may use narrower types and leave out what it does not know."""
    frame = ONE.select("status", "request", "input_tokens", "arrival_s").cast(
        {"request": pl.UInt32, "arrival_s": pl.Float32}
    )
    run = write_run(tmp_path, INFO, frame.with_columns(sent_s=pl.lit(float("nan"))))
    assert dict(run.requests.schema) == records.REQUESTS
    assert run.requests["first_token_s"].to_list() == [None]
    assert run.requests["sent_s"].to_list() == [None]


@pytest.mark.parametrize(
    ("frame", "place"),
    [
        (ONE.with_columns(colour=pl.lit("red")), "unknown column 'colour'"),
        (ONE.drop("arrival_s"), "'arrival_s' is missing"),
        (ONE.with_columns(arrival_s=pl.lit(float("nan"))), "'arrival_s' holds a null"),
        (ONE.with_columns(status=pl.lit(None, pl.String)), "'status' holds a null"),
        (ONE.with_columns(status=pl.lit("lost")), "'lost' of request 0"),
        (ONE.with_columns(input_tokens=pl.lit("many")), "many"),
    ],
)
def test_rows_that_do_not_fit_the_schema_are_refused(
    tmp_path: Path, frame: pl.DataFrame, place: str
) -> None:
    """The message is one line and names the column; nothing is written."""
    with pytest.raises(RecordsError) as refusal:
        write_run(tmp_path / "run", INFO, frame)
    assert place in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def _cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _without_a_column(path: Path) -> None:
    pl.read_parquet(path).drop("steps").write_parquet(path)


def _of_the_future(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))


@pytest.mark.parametrize(
    ("name", "damage", "place"),
    [
        ("requests.parquet", Path.unlink, "no such file"),
        ("run.json", Path.unlink, "run directory"),
        ("requests.parquet", _cut_in_half, "truncated"),
        ("summary.json", _cut_in_half, "broken JSON"),
        ("spans.parquet", _without_a_column, "'steps' is missing"),
        ("run.json", _of_the_future, "schema version 99"),
        ("run.json", lambda path: path.write_text("{}"), "schema_version"),
        ("run.json", lambda path: path.write_text('{"schema_version": 1, "name": 3}'), "str"),
        ("summary.json", lambda path: path.write_text("[]"), "not a JSON object"),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(
    a_run: ARun, name: str, damage: Callable[[Path], object], place: str
) -> None:
    """The message names the file and what is wrong with it."""
    directory = a_run("run", requests=20).directory
    assert directory is not None
    damage(directory / name)
    with pytest.raises(RecordsError) as refusal:
        read_run(directory)
    assert name in str(refusal.value)
    assert place in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_write_that_fails_leaves_the_run_that_was_there(a_run: ARun) -> None:
    """Every file is whole before any takes its name: here the last one cannot be encoded."""
    run = a_run("run", requests=20)
    assert run.directory is not None
    before = {path.name: path.read_bytes() for path in run.directory.iterdir()}
    broken = RunInfo(name="b", source="simulated", system="colocated", config={"no": object()})
    with pytest.raises(TypeError):
        write_run(run.directory, broken, ONE)
    assert {path.name: path.read_bytes() for path in run.directory.iterdir()} == before


def test_a_directory_that_cannot_be_made_is_a_one_line_error(tmp_path: Path) -> None:
    """A file stands where the run should go."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(RecordsError, match="cannot write the run"):
        write_run(tmp_path / "taken", INFO, ONE)


def test_the_fingerprint_names_the_machine_kind_but_not_the_machine() -> None:
    """Results are shared: no host name, no user name, no home directory in them."""
    found = records.fingerprint()
    assert found["cpu"]
    assert found["cores"] == os.cpu_count()
    text = json.dumps(found)
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    if len(platform.node()) > 5:
        assert platform.node() not in text


def test_versions_of_what_is_not_installed_are_left_out() -> None:
    """A light installation has no torch, and that is no error."""
    assert set(records.installed_versions(("polars", "not-a-package-at-all"))) == {"polars"}


def test_a_run_of_before_the_later_columns_can_be_read(a_run: ARun) -> None:
    """Runs without class, attempts and retry_after_s have nulls there."""
    run = a_run("old", requests=5)
    assert run.directory is not None
    path = run.directory / "requests.parquet"
    pl.read_parquet(path).drop("class", "attempts", "retry_after_s").write_parquet(path)
    again = read_run(run.directory).requests
    assert again.equals(run.requests)
    assert again["class"].null_count() == 5
