"""Are trace files read whole, and bad ones refused in one line with place and remedy?"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.formats import read_azure, read_mooncake
from workloads.trace import Trace, TraceError, open_trace, read_trace, write_mooncake

AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
SCHEMA = {
    "request": pl.Int64,
    "arrival_s": pl.Float64,
    "input_tokens": pl.Int64,
    "output_tokens": pl.Int64,
    "hash_ids": pl.List(pl.Int64),
}


def changed(line: str, **fields: object) -> str:
    """A JSONL line with other values; None drops the field."""
    values = json.loads(line) | fields
    return json.dumps({key: value for key, value in values.items() if value is not None})


def test_a_trace_has_the_columns_of_the_contract_in_seconds(write, make_row) -> None:
    """Milliseconds become seconds; columns and types are those that every consumer reads."""
    trace = read_trace(write(make_row(0), make_row(1500, 1025, 1, [1, 3, 4])))
    assert dict(trace.frame.schema) == SCHEMA
    assert trace.frame.rows() == [(0, 0.0, 600, 5, [1, 2]), (1, 1.5, 1025, 1, [1, 3, 4])]
    assert trace.duration_s == 1.5
    assert trace.rate_rps == pytest.approx(2 / 1.5)


def test_arrival_zero_output_one_and_126k_tokens_are_ordinary(write, make_row) -> None:
    """Edge cases of the real trace are read without complaint, 28 at one instant too."""
    long = make_row(0, 126_195, 1, range(247))
    trace = read_trace(write(*[long] * 28))
    assert trace.frame.height == 28
    assert trace.rate_rps == 0.0


def test_aliases_blank_lines_bom_and_unknown_fields(write, make_row) -> None:
    """created_time, input_tokens and output_tokens are read as timestamp and lengths."""
    alias = '{"created_time": 3, "input_tokens": 5, "output_tokens": 2, "hash_ids": [9], "x": [1]}'
    trace = read_trace(write("\ufeff" + make_row(), "", alias, "\r"))
    assert trace.frame.row(1) == (1, 0.003, 5, 2, [9])


@pytest.mark.parametrize(
    ("ids", "dtype"),
    [
        ([-(2**63), 2**63 - 1], pl.Int64),
        ([0, 2**64 - 1], pl.UInt64),
        (["9f", "a much longer id than sixty-four bits would hold"], pl.String),
    ],
)
def test_ids_are_kept_whole(write, make_row, tmp_path, ids, dtype) -> None:
    """Any 64-bit or string id comes back unchanged, also after writing."""
    trace = read_trace(write(make_row(ids=ids)))
    assert trace.frame["hash_ids"].to_list() == [ids]
    assert trace.frame["hash_ids"].dtype == pl.List(dtype)
    write_mooncake(trace, tmp_path / "again.jsonl")
    assert read_trace(tmp_path / "again.jsonl").frame.equals(trace.frame)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"output_length": None}, "output_length (or output_tokens) is missing"),
        ({"timestamp": None}, "timestamp (or created_time) is missing"),
        ({"hash_ids": None}, "hash_ids is missing"),
        ({"timestamp": -1}, "timestamp is -1, negative"),
        ({"timestamp": float("nan")}, "NaN or infinite"),
        ({"timestamp": float("inf")}, "NaN or infinite"),
        ({"timestamp": "0"}, "timestamp is '0'; give milliseconds"),
        ({"timestamp": 2}, "timestamp 2 is before the row above (3000); sort by timestamp"),
        ({"timestamp": 1e300}, "timestamp 1e+300 is more than a year after the first row"),
        ({"input_length": 0, "hash_ids": []}, "input_length is 0"),
        ({"input_length": 600.5}, "input_length is 600.5; give a whole number"),
        ({"input_length": 10**30}, "give a whole number"),
        ({"output_length": 0}, "output_length is 0"),
        ({"hash_ids": [1]}, "hash_ids has 1 ids, but 600 tokens in blocks of 512 need 2"),
        ({"hash_ids": [1, 2, 3]}, "hash_ids has 3 ids"),
        ({"hash_ids": [1, 2.5]}, "give integers of 64 bits, or strings"),
        ({"hash_ids": ["a", "b"]}, "mixes numbers and strings"),
        ({"hash_ids": [1, 2**64]}, "over 64 bits; write the ids as strings"),
        ({"hash_ids": 7}, "hash_ids is 7; give a list"),
    ],
)
def test_a_bad_row_is_named(write, make_row, fields, says) -> None:
    """The message has file, line (blank ones counted), field and remedy, in one line."""
    path = write(make_row(3000), "", changed(make_row(3000), **fields))
    with pytest.raises(TraceError) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line", ['{"timestamp": 0, "input_le', "[1, 2]", "{]", '{"timestamp": 1e999}']
)
def test_a_line_that_is_no_object_is_named(write, make_row, line) -> None:
    """A cut or foreign line is refused where it stands."""
    path = write(make_row(), line)
    with pytest.raises(TraceError, match=r"trace\.jsonl:2: .*; give"):
        read_trace(path)


def test_the_first_bad_row_is_named_not_the_first_broken_rule(write, make_row) -> None:
    """Row 2 has a bad length, row 3 a bad time: row 2 it is."""
    path = write(make_row(5), make_row(5, output=0), make_row(1))
    with pytest.raises(TraceError, match=":2: output_length"):
        read_trace(path)


def test_seconds_instead_of_milliseconds_are_noticed(write, make_row) -> None:
    """200 requests in 50 'ms' are refused, with the way out; naming the unit reads them."""
    path = write(*(make_row(i / 4) for i in range(200)))
    with pytest.raises(TraceError, match=r"look like seconds .* multiply them by 1000"):
        read_trace(path)
    assert read_trace(path, timestamp_unit="s").duration_s == 49.75
    assert read_trace(path, timestamp_unit="ms").duration_s == 0.04975


def test_wall_clock_times_are_rebased_and_noted(write, make_row) -> None:
    """Epoch milliseconds start at 0, and the trace says so; epoch seconds are refused."""
    trace = read_trace(write(make_row(1_700_000_000_000), make_row(1_700_000_001_000)))
    assert trace.frame["arrival_s"].to_list() == [0.0, 1.0]
    assert trace.transforms == ("wall-clock timestamps re-based to 0",)
    with pytest.raises(TraceError, match="look like seconds"):
        read_trace(write(make_row(1_700_000_000)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"hello", "format not recognised"),
        (b"\x00\xff\x00", "format not recognised"),
        (b"TIMESTAMP,ContextTokens\n1,2\n", "column GeneratedTokens is missing"),
        (AZURE_HEADER.encode() + b"\n", "no rows"),
    ],
)
def test_files_that_are_no_trace_are_refused(write, content, says) -> None:
    """Empty, foreign and headless files say what was expected."""
    with pytest.raises(TraceError, match=says):
        read_trace(write(content))


def test_missing_files_and_directories_are_refused(tmp_path) -> None:
    """A wrong path is named."""
    with pytest.raises(TraceError, match=r"none\.jsonl: no such file"):
        read_trace(tmp_path / "none.jsonl")
    with pytest.raises(TraceError, match="is a directory"):
        read_trace(tmp_path)


def test_another_block_size_is_a_parameter(write, make_row) -> None:
    """600 tokens are 38 blocks of 16: read with 16, refused with 512, a size of 0 is none."""
    path = write(make_row(ids=range(38)))
    assert read_trace(path, block_tokens=16).block_tokens == 16
    with pytest.raises(TraceError, match="set the block size"):
        read_trace(path)
    with pytest.raises(TraceError, match="block_tokens is 0"):
        read_trace(path, block_tokens=0)


def test_azure_rows_get_fresh_ids(write) -> None:
    """Times are re-based to 0 and no block is shared: 513 tokens are two blocks of their own."""
    rows = ("2023-11-16 18:15:46.6805900,513,44", "2023-11-16 18:15:50.9951690,5,1")
    trace = open_trace(str(write(AZURE_HEADER, *rows, name="azure.csv")))
    assert trace.frame.rows() == [(0, 0.0, 513, 44, [0, 1]), (1, 4.314579, 5, 1, [2])]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("2023-11-16 18:15:47,x,44", "ContextTokens is 'x'; give a whole number"),
        ("2023-11-16 18:15:47,5,0", "GeneratedTokens is '0'; give a whole number"),
        ("yesterday,5,44", "TIMESTAMP is 'yesterday'; give a time like"),
        ("2023-11-16 18:15:45,5,44", "before the row above; sort by TIMESTAMP"),
    ],
)
def test_a_bad_azure_row_is_named(write, line, says) -> None:
    """The line of the file, the field and the remedy."""
    path = write(AZURE_HEADER, "2023-11-16 18:15:46,374,44", line)
    with pytest.raises(TraceError) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert says in str(error.value)


def test_a_trace_that_cannot_be_written_leaves_nothing(make_trace, tmp_path) -> None:
    """A target below a file is refused in one line."""
    trace = make_trace((0, 5, [1]))
    with pytest.raises(TraceError, match="cannot be written"):
        write_mooncake(trace, tmp_path / "trace.jsonl" / "below.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.jsonl"]


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 1030),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(), st.text(max_size=2), st.none()), max_size=3),
)
FIELDS = st.sampled_from(
    ["timestamp", "created_time", "input_length", "input_tokens", "output_length", "hash_ids"]
)


NUMBERS = st.one_of(st.integers(), st.integers(0, 3), st.floats(0), st.floats())
IDS = st.lists(st.one_of(st.integers(0, 2**64), st.integers()), min_size=1, max_size=2)
NEARLY_ROWS = st.fixed_dictionaries(
    {
        "timestamp": NUMBERS,
        "input_length": st.integers(-1, 1024),
        "output_length": st.integers(0, 3),
        "hash_ids": IDS,
    }
)
LINES = st.one_of(st.binary(max_size=9), st.dictionaries(FIELDS, VALUES), NEARLY_ROWS)


@given(st.one_of(st.lists(LINES), st.lists(NEARLY_ROWS, max_size=3)))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_trace_or_one_line(lines) -> None:
    """Whatever stands in a JSONL file, nothing but a Trace or a TraceError comes out."""
    data = b"\n".join(
        line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines
    )
    one_line_or_fine(lambda: read_mooncake(data, Path("t.jsonl")))


@given(st.lists(st.lists(st.one_of(st.text(max_size=5), st.integers().map(str)), max_size=4)))
@settings(max_examples=200, deadline=None)
def test_any_csv_is_a_trace_or_one_line(rows) -> None:
    """Whatever stands below Azure's header, likewise."""
    text = "\n".join([AZURE_HEADER, *(",".join(row) for row in rows)])
    one_line_or_fine(lambda: read_azure(text.encode(errors="replace"), Path("t.csv")))


def one_line_or_fine(read: Callable[[], Trace]) -> None:
    """Runs `read`; a TraceError must be one line."""
    try:
        message = "read: " + str(read().frame.height)
    except TraceError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert message != "read: 0"


def test_the_conversation_trace_is_read_whole_and_fast(
    conversation: Trace, conversation_file: Path
) -> None:
    """12,031 requests with the published facts; CPU time relative to plain json, not absolute."""
    assert conversation.frame.height == 12_031
    assert round(conversation.duration_s) == 3537
    assert conversation.sha256.startswith("b8cbb061a852")
    assert cpu_s(lambda: read_trace(conversation_file)) < 2 * cpu_s(
        lambda: plain_json(conversation_file)
    )


def plain_json(path: Path) -> list[object]:
    """What reading costs without any check."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def cpu_s(work) -> float:
    """The least CPU time of three tries."""
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def test_the_azure_trace_is_read_whole(azure_file: Path) -> None:
    """19,366 requests in 3,501.7 s."""
    trace = read_trace(azure_file)
    assert trace.frame.height == 19_366
    assert trace.duration_s == pytest.approx(3501.721937)
