"""The engine process ends with its job, with a refusal, or with the worker that started it."""

import subprocess
import sys
import time

import pytest
from sse_server import Server, good_stream, serving

from mooncake_bench.replay import wire
from mooncake_bench.replay.client import Address
from mooncake_bench.replay.options import ReplayOptions
from mooncake_bench.replay.prepare import load_trace
from mooncake_bench.replay.target import Target
from workloads.errors import TraceError

TWO_ROWS = (
    '{"timestamp": 0, "input_length": 5, "output_length": 3, "hash_ids": [1]}\n'
    '{"timestamp": 100, "input_length": 5, "output_length": 3, "hash_ids": [2]}\n'
)


@pytest.fixture
def options(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(TWO_ROWS)
    return ReplayOptions(trace=str(path))


@pytest.fixture
def process():
    command = [sys.executable, "-m", "mooncake_bench.replay.engine_process"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    yield child
    child.kill()
    child.communicate()


def a_job(options: ReplayOptions, server: Server, **changes) -> wire.Job:
    trace = load_trace(options)
    target = Target(server.url, Address("127.0.0.1", server.port), "", "small")
    plain = {"worker": 1, "workers": 2, "sha256": trace.sha256, "rows": trace.frame.height}
    return wire.Job(options=options, target=target, **plain | changes)


def test_a_job_is_prepared_then_started_then_reported(options, process):
    """The second of two workers sends the second row, and says so."""
    with serving(Server(good_stream)) as server:
        wire.write_frame(process.stdin, wire.encode(a_job(options, server)))
        ready = wire.decode_report(wire.read_frame(process.stdout))
        assert (ready, server.received) == (wire.Ready(planned=1), [])
        wire.write_frame(process.stdin, wire.encode(wire.Start(time.time() + 0.1)))
        reports = []
        while (frame := wire.read_frame(process.stdout)) is not None:
            reports.append(wire.decode_report(frame))
    assert server.received == [1]
    assert isinstance(reports[-1], wire.Done)
    assert reports[-1].stats.planned == 1
    batches = [report.batch for report in reports[:-1] if report.batch is not None]
    assert [batch.table()["request"].tolist() for batch in batches] == [[1.0]]
    assert process.wait(10) == 0


def test_another_trace_than_the_masters_is_refused(options, process):
    """Hosts with different files would send a mixture of two traces."""
    with serving(Server(good_stream)) as server:
        wire.write_frame(process.stdin, wire.encode(a_job(options, server, sha256="other")))
        done = wire.decode_report(wire.read_frame(process.stdout))
    assert isinstance(done, wire.Done)
    assert "not the master's file" in done.error


def test_the_engine_ends_when_its_worker_is_gone(options, process):
    """A closed pipe is all that a killed worker leaves behind."""
    with serving(Server(good_stream)) as server:
        wire.write_frame(process.stdin, wire.encode(a_job(options, server)))
        assert wire.decode_report(wire.read_frame(process.stdout)) == wire.Ready(planned=1)
        process.stdin.close()
        assert process.wait(10) == 0
    process.stdin = None


def test_a_trace_that_cannot_be_read_is_the_masters_error_too(tmp_path):
    """The same reading code, the same line, on the master and in the engine process."""
    with pytest.raises(TraceError, match="no such file"):
        load_trace(ReplayOptions(trace=str(tmp_path / "none.jsonl")))
