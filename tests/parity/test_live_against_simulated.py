"""Does the simulator tell the truth about the live cluster? The same trace on both clocks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mooncake_bench.demo import serving
from mooncake_bench.records import Run, read_run

TRACE = "conversation-like:rate_rps=0.7,duration_s=45"
SEED = "3"
CLUSTER = ["--prefill", "2", "--decode", "2"]


def run(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "mooncake_bench.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("simulated")
    run("simulate", "--trace", TRACE, "--seed", SEED, *CLUSTER, "--out", out)
    return read_run(out)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("live")
    with serving(CLUSTER) as url:
        run("replay", "--url", url, "--trace", TRACE, "--seed", SEED, "--out", out)
    return read_run(out)


@pytest.mark.live
@pytest.mark.timeout(300)
def test_the_simulator_predicts_the_live_cluster(simulated: Run, live: Run):
    """The issue's bounds, 10 % and 3 points, hold for ten minutes; 45 s get some slack.

    Distributions are compared, never single requests: a millisecond of jitter changes routing.
    """
    assert live.summary["offered"] == simulated.summary["offered"] > 20
    assert live.summary["finished"] == simulated.summary["finished"]
    for name in ("ttft_s", "tbt_s"):
        for quantile in ("p50", "p90"):
            expected = simulated.summary[name][quantile]
            assert live.summary[name][quantile] == pytest.approx(expected, rel=0.15, abs=0.01)
    difference = live.summary["attainment"] - simulated.summary["attainment"]
    assert abs(difference) <= 0.05
    assert live.summary["prefix_hit_ratio"] == pytest.approx(
        simulated.summary["prefix_hit_ratio"], abs=0.05
    )


@pytest.mark.live
@pytest.mark.timeout(300)
def test_a_live_run_has_the_columns_of_a_simulated_one(simulated: Run, live: Run):
    """One schema: every stamp that the simulator knows is known of the live run too."""
    assert live.info.source == "live-modelled"
    assert simulated.info.source == "simulated"
    for name in ("requests", "spans", "samples"):
        frames = getattr(live, name), getattr(simulated, name)
        assert frames[0].schema == frames[1].schema
    for column in ("placed_s", "prefill_start_s", "transferred_s", "reused_tokens", "prefill"):
        assert live.requests[column].null_count() == 0
    assert set(live.samples["instance"]) == set(simulated.samples["instance"])
