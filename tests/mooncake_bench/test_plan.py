"""`plan`: what is read, the lower bound, the search, the intervals, and when a run is given up."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mooncake_bench.plan import interval
from mooncake_bench.plan.bottleneck import WORDS, bottleneck
from mooncake_bench.plan.bound import Demand
from mooncake_bench.plan.candidate import Candidate, Job, Load, Scene, Trial, price_per_hour
from mooncake_bench.plan.errors import PlanError
from mooncake_bench.plan.outcome import BLOCKS, Outcome, by_block
from mooncake_bench.plan.search import smallest
from mooncake_bench.plan.spec import Machine, Prices, Promise, load_spec
from mooncake_bench.plan.trial import run_trial
from reference_cluster.cost_model import load_profile
from workloads.trace import open_trace

PROFILE = "h100-llama3-70b"
SMALL = """
trace = "poisson-16k:rate_rps=1,duration_s=200"
[[profiles]]
profile = "h100-llama3-70b"
"""
SPLIT = Candidate(PROFILE, "disaggregated", prefill=2, decode=1)


def a_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    return path


def a_job(candidate: Candidate, is_whole: bool = True, **load: Any) -> Job:
    scene = Scene("poisson-16k:rate_rps=1,duration_s=200", "", False, Promise(3.0, 0.1, 0.95))
    return Job(scene, Trial(candidate, Load(**load)), is_whole)


def an_outcome(met: float, blocks: int = BLOCKS) -> Outcome:
    """100 requests in every block, the same share of them met."""
    return Outcome(100 * blocks, met, offered=[100] * blocks, met=[round(100 * met)] * blocks)


# ---- the input ---------------------------------------------------------------------------------


def test_a_plan_needs_little(tmp_path: Path):
    """A trace and a profile; everything else has a default."""
    spec = load_spec(a_file(tmp_path, SMALL))
    assert spec.growth == (1.0,)
    assert spec.slo.target == 0.95


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "trace"),
        (SMALL + "nodes = 3", "nodes of [limits]"),
        (SMALL.replace("[[", "[slo]\ntarget = 1.0\n[["), "share below 1"),
        (SMALL.replace("[[", "[slo]\nttft_s = 0\n[["), "above 0"),
        (SMALL.replace("[[", "[limits]\nnodes = 0\n[["), "at least 2"),
        (SMALL.replace("[[", "growth = []\n[["), "empty"),
        ("= 3", "not valid TOML"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, said: str):
    """Place and remedy, whatever is wrong."""
    with pytest.raises(PlanError) as raised:
        load_spec(a_file(tmp_path, text))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_trace_is_found_beside_the_file(tmp_path: Path):
    """A relative path means the plan's own directory."""
    (tmp_path / "mine.jsonl").write_text("")
    spec = load_spec(
        a_file(tmp_path, SMALL.replace("poisson-16k:rate_rps=1,duration_s=200", "mine.jsonl"))
    )
    assert spec.trace == str((tmp_path / "mine.jsonl").resolve())


# ---- prices and names --------------------------------------------------------------------------


def test_a_price_is_of_gpus_and_pools():
    """3 nodes of 8 GPUs at 2 an hour, and 100 GB of pool on each of 2 prefill nodes at 0.01."""
    profile = load_profile(PROFILE)
    tokens = round(100e9 / profile.kv_bytes_per_token)
    with_pool = SPLIT.with_options(prefill__dram_tokens=tokens)
    machine = Machine(PROFILE, price_per_gpu_hour=2.0)
    assert price_per_hour(SPLIT, machine, profile, Prices()) == 48.0
    price = price_per_hour(with_pool, machine, profile, Prices(dram_per_gb_hour=0.01))
    assert price == pytest.approx(48.0 + 2 * 100 * 0.01, rel=1e-4)


def test_a_setting_of_nought_is_the_default():
    """So that a candidate is the same one however it came about."""
    assert SPLIT.with_options(prefill__dram_tokens=0) == SPLIT
    assert SPLIT.with_options(conductor__admission="predictive").title == "2P+1D, predictive"


# ---- the lower bound ---------------------------------------------------------------------------


def test_the_bound_is_arithmetic():
    """One prompt length, nothing shared: nodes = the cheapest 95 % of prefill seconds / time."""
    trace = open_trace("poisson-16k:rate_rps=1,duration_s=200,shared=0.001")
    profile = load_profile(PROFILE)
    slo = Promise(ttft_s=10.0, tbt_s=0.1, target=0.95)
    bound = Demand(trace).bound(Load(), profile, slo)
    cost = profile.prefill
    one_s = cost.base_s + 16384 * cost.token_s + 16384**2 * cost.token2_s
    span_s = float(trace.frame["arrival_s"][-1]) + 10.0
    assert bound.prefill_nodes == pytest.approx(190 * one_s / span_s)
    assert bound.reachable == 1.0
    assert bound.nodes >= 2


def test_no_run_beats_the_bound():
    """With fewer prefill nodes than the perfect system the target cannot be met."""
    trace = open_trace("poisson-16k:rate_rps=1,duration_s=200")
    bound = Demand(trace).bound(Load(speed=8.0), load_profile(PROFILE), Promise(3.0, 0.1, 0.95))
    fewer = SPLIT.with_split(int(bound.prefill_nodes), 4)
    assert fewer.prefill >= 1
    assert run_trial(a_job(fewer, speed=8.0)).attainment < 0.95


# ---- one run -----------------------------------------------------------------------------------


def test_a_lost_run_is_given_up():
    """Stopped early, it says an upper bound that the whole run does not exceed."""
    lost = run_trial(a_job(SPLIT, is_whole=False, speed=8.0))
    whole = run_trial(a_job(SPLIT, speed=8.0))
    assert lost.is_stopped
    assert not whole.is_stopped
    assert whole.attainment <= lost.attainment < 0.95


def test_a_run_that_holds_is_whole():
    """Looking at it on the way changes nothing."""
    looked_at, whole = (run_trial(a_job(SPLIT, is_whole=one)) for one in (False, True))
    assert msgspec.structs.replace(looked_at, cpu_s=0.0) == msgspec.structs.replace(
        whole, cpu_s=0.0
    )
    assert sum(whole.offered) == whole.requests == 200
    assert whole.holds(0.95)


def test_slower_times_never_help():
    """The profile's error enters as factors of all prefill and decode times."""
    job = a_job(SPLIT, speed=4.0)
    slow = msgspec.structs.replace(job, trial=Trial(SPLIT, Load(speed=4.0), 1.5, 1.5))
    assert run_trial(slow).attainment < run_trial(job).attainment


def test_blocks_are_parts_of_the_time():
    """Ten requests in the first half of the time, one of them missed, and one at the end."""
    offered, met = by_block([0.0] * 10 + [60.0], [True] * 9 + [False, True], 60.0)
    assert (offered[0], met[0]) == (10, 9)
    assert (offered[-1], met[-1]) == (1, 1)
    assert sum(offered) == 11


# ---- search ------------------------------------------------------------------------------------


def counting(needed: int, low: int, high: int) -> tuple[int | None, list[int]]:
    asked: list[int] = []

    async def holds(count: int) -> bool:
        asked.append(count)
        return count >= needed

    return asyncio.run(smallest(low, high, holds)), asked


@pytest.mark.parametrize("needed", range(1, 41))
def test_the_smallest_that_holds_is_found(needed: int):
    """Whatever it is, in a number of runs that grows with its logarithm."""
    found, asked = counting(needed, 1, 40)
    assert found == needed
    assert len(asked) == len(dict.fromkeys(asked)) <= 11


def test_nothing_holds_within_the_limit():
    """None is found, after asking for the largest."""
    found, asked = counting(99, 3, 40)
    assert found is None
    assert asked[-1] == 40


# ---- how sure ----------------------------------------------------------------------------------


def test_an_even_run_has_no_spread():
    """Every stretch of time is like every other."""
    estimate = interval.attainment([an_outcome(0.97)])
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((0.97, 0.97, 0.97))
    assert interval.confidence([an_outcome(0.97)], 0.95) == 1.0


def test_a_bad_hour_widens_the_interval():
    """The same attainment, all misses in one stretch: less is known."""
    met = [100] * (BLOCKS - 6) + [70] * 6
    uneven = Outcome(100 * BLOCKS, 0.97, offered=[100] * BLOCKS, met=met)
    estimate = interval.attainment([uneven])
    assert estimate.low < 0.96
    assert estimate.high > 0.98


def test_capacity_lies_between_the_loads():
    """97 % at 10 req/s, 93 % at 11: 95 % at 10.5."""
    found = interval.capacity((10.0, [an_outcome(0.97)]), (11.0, [an_outcome(0.93)]), target=0.95)
    assert found.value == pytest.approx(10.5)


@pytest.mark.parametrize(
    ("misses", "stages", "named"),
    [
        ({}, {}, "none"),
        ({"late_first_token": 9}, {"queue": 20.0, "prefill": 3.0}, "prefill-compute"),
        ({"late_first_token": 9}, {"queue": 1.0, "prefill": 33.0}, "long-prompts"),
        ({"late_first_token": 9}, {"queue": 1.0, "transfer": 33.0}, "links"),
        ({"slow_tokens": 9}, {"decode": 30.0}, "decode-step"),
        ({"slow_tokens": 9}, {"decode_queue": 20.0, "decode": 30.0}, "decode-memory"),
    ],
)
def test_the_bottleneck_is_where_the_time_went(
    misses: dict[str, int], stages: dict[str, float], named: str
):
    """Of the requests that missed."""
    all_stages: dict[str, float | None] = {
        **dict.fromkeys(("queue", "reuse_load", "prefill", "transfer", "decode_queue", "decode")),
        **stages,
    }
    outcome = Outcome(100, 0.9, misses=misses, stages_missed=all_stages)
    assert bottleneck(outcome, "disaggregated") == named
    assert named in WORDS
