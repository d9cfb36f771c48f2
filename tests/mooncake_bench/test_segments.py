"""Can a run be read while it is written, and what is left of it when its writer is killed?"""

from __future__ import annotations

import signal
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path

import msgspec
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from mooncake_bench import metrics, simulation
from mooncake_bench.opened import COMPLETE, INCOMPLETE, RUNNING, open_run
from mooncake_bench.records import Run, write_run
from mooncake_bench.replay.assemble import build_frames
from mooncake_bench.replay.live_run import LiveRun
from mooncake_bench.replay.recorder import FINISHED, Recorder, Verdict
from mooncake_bench.replay.schedule import plan
from mooncake_bench.segments import SegmentWriter
from mooncake_bench.simulation import simulate_trace
from reference_cluster.config import load_config
from reference_cluster.cost_model import load_profile
from workloads.trace import open_trace

ARun = Callable[..., Run]


def appended(writer: SegmentWriter, run: Run, low: int, high: int) -> None:
    rows = run.requests[low:high]
    spans = run.spans.filter(pl.col("request").is_in(rows["request"].implode()))
    writer.append(requests=rows, spans=spans, samples=run.samples[low:high])


def test_a_run_is_read_as_it_grows(a_run: ARun, tmp_path: Path) -> None:
    """Opened again it has the new requests; at the end it says what the whole run says."""
    whole = a_run("whole", requests=90)
    directory = tmp_path / "live"
    writer = SegmentWriter(directory, whole.info, planned=90)
    first = open_run(directory)
    assert (first.state, first.frame.height) == (RUNNING, 0)
    appended(writer, whole, 0, 40)
    second = open_run(directory, first)
    assert second.frame.height == 40
    assert open_run(directory, second) is second
    appended(writer, whole, 40, 90)
    last = open_run(directory, second)
    assert_frame_equal(last.frame, metrics.per_request(whole.requests, whole.spans))
    for name in ("attainment", "goodput_rps", "ttft_s", "tbt_s"):
        assert last.summary[name] == whole.summary[name]
    request = int(whole.spans["request"][0])
    assert_frame_equal(last.spans(request), whole.spans.filter(request=request))
    write_run(directory, whole.info, whole.requests, whole.spans, whole.samples)
    writer.close()
    ended = open_run(directory, last)
    assert ended.state == COMPLETE
    assert not (directory / "segments").exists()


def test_an_earlier_run_in_the_directory_makes_way(a_run: ARun) -> None:
    """While it is written anew, the directory shows the new run, not the old one."""
    old = a_run("run", requests=30)
    assert old.directory is not None
    writer = SegmentWriter(old.directory, msgspec.structs.replace(old.info, name="new"))
    assert open_run(old.directory).info.name == "new"
    writer.close()
    assert open_run(old.directory).info.name == old.info.name


def test_a_replay_writes_its_records_as_they_are(a_run: ARun, tmp_path: Path) -> None:
    """The reader makes of them the frames that the replay makes at its end."""
    frame = open_trace("poisson-16k:rate_rps=5,duration_s=20").frame
    whole = plan(frame, 1.0)
    recorder = Recorder(whole.request, whole.due_s)
    live = LiveRun(tmp_path / "live", a_run("any", requests=1).info, whole)
    batches = []
    for row in range(len(whole)):
        due_s = float(whole.due_s[row])
        recorder.sent(row, due_s)
        times = array("d", [due_s + 0.1, due_s + 0.15, due_s + 0.3])
        recorder.settle(Verdict(row, FINISHED, due_s + 0.3, times=times))
        if row % 10 == 9:
            batches.append(recorder.drain())
            live._writer._last_s = 0.0
            live.add(batches[-1])
    run = open_run(tmp_path / "live")
    requests, spans = build_frames(whole, batches)
    assert_frame_equal(run.frame, metrics.per_request(requests, spans))
    assert_frame_equal(run.spans(3), spans.filter(request=3))
    live.close(keep=True)


def test_a_cut_segment_costs_that_segment_alone(a_run: ARun, tmp_path: Path) -> None:
    """What has no name yet is not looked at."""
    whole = a_run("whole", requests=20)
    writer = SegmentWriter(tmp_path / "live", whole.info)
    appended(writer, whole, 0, 20)
    (tmp_path / "live" / "segments" / "requests-0000002.partial").write_bytes(b"ARROW1")
    assert open_run(tmp_path / "live").frame.height == 20
    writer.close(keep=True)


KILLED = """
import sys
from pathlib import Path
from mooncake_bench.records import read_run
from mooncake_bench.segments import SegmentWriter
run = read_run(Path(sys.argv[1]))
writer = SegmentWriter(Path(sys.argv[2]), run.info, planned=run.requests.height)
writer.append(requests=run.requests[:25], spans=run.spans.filter(run.spans["request"] < 25))
print("written", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills with SIGKILL")
def test_after_a_kill_the_run_opens_and_says_that_it_is_incomplete(
    a_run: ARun, tmp_path: Path
) -> None:
    """What was written is there; the reason says how much of the run that is."""
    whole = a_run("whole", requests=60)
    directory = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(whole.directory), str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        running = open_run(directory)
        assert running.state == RUNNING
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    run = open_run(directory, running)
    assert run.state == INCOMPLETE
    assert not run.info.valid
    assert run.frame.height == 25
    assert "25 of 60 requests are known" in run.info.invalid_reasons[-1]


def test_a_simulation_that_is_looked_at_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments appear from the start on, and no number of the run changes by it."""
    trace = open_trace("conversation-like:rate_rps=4,duration_s=240")
    overrides = {"profile": "h100-llama3-70b", "prefill_instances": 2, "decode_instances": 2}
    config = load_config(None, overrides)
    profile = load_profile(config.profile)
    unseen = simulate_trace(trace, config, profile, tmp_path / "unseen")
    monkeypatch.setattr(simulation, "QUICK_S", 0.0)
    monkeypatch.setattr(SegmentWriter, "is_due", True)
    looked = []
    close = SegmentWriter.close

    def closing(writer: SegmentWriter, *, keep: bool = False) -> None:
        looked.append(open_run(tmp_path / "seen").frame.height)
        close(writer, keep=keep)

    monkeypatch.setattr(SegmentWriter, "close", closing)
    seen = simulate_trace(trace, config, profile, tmp_path / "seen")
    assert looked
    for name in ("requests", "spans", "samples"):
        assert_frame_equal(getattr(seen, name), getattr(unseen, name))
