"""Does a calibration find the costs of what it probes?"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest

from mooncake_bench.calibrate.fit import (
    DecodePoint,
    Points,
    PrefillPoint,
    as_toml,
    fit_decode,
    fit_prefill,
    fitted_profile,
)
from mooncake_bench.calibrate.probe import ProbePlan, probe
from mooncake_bench.calibrate.served import served
from mooncake_bench.records import RecordsError, Run, RunInfo, read_run
from mooncake_bench.simulation import as_requests, request_frame, simulate_trace
from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import CostModel, Profile, load_profile
from reference_cluster.simulate import simulate
from reference_cluster.spans import span_columns
from tests.reference_cluster.live import live
from tests.reference_cluster.small import a_config, a_profile
from workloads.trace import open_trace


def test_exact_times_give_their_coefficients_back() -> None:
    """Points made by the cost model itself: 2 ms + 10 us a token + 1 ns a pair + 1 us reused."""
    points = [
        PrefillPoint(n, p, 2e-3 + 1e-5 * (n - p) + 1e-9 * (n * n - p * p) + 1e-6 * p)
        for n, p in [(64, 0), (512, 0), (2048, 0), (4096, 0), (4096, 2048), (4096, 3000)]
    ]
    fitted = fit_prefill(points)
    assert fitted.base_s == pytest.approx(2e-3)
    assert fitted.token_s == pytest.approx(1e-5)
    assert fitted.token2_s == pytest.approx(1e-9)
    assert fitted.reused_token_s == pytest.approx(1e-6)
    steps = [DecodePoint(b, c, 1e-3 + 1e-4 * b + 1e-7 * c) for b in (1, 4, 8) for c in (90, 9000)]
    decode = fit_decode(steps)
    assert decode.base_s == pytest.approx(1e-3)
    assert decode.sequence_s == pytest.approx(1e-4)
    assert decode.context_token_s == pytest.approx(1e-7)


def test_no_coefficient_is_negative() -> None:
    """Times that fall with the square of the length get a square term of zero."""
    points = [PrefillPoint(n, 0, 1e-5 * n - 1e-10 * n * n) for n in (100, 1000, 10_000)]
    fitted = fit_prefill(points)
    assert fitted.token2_s == 0.0
    assert fitted.token_s > 0


def test_a_profile_survives_its_file(tmp_path: pytest.TempPathFactory) -> None:
    """Written and read again it is the same, its error and source among the rest."""
    points = [PrefillPoint(n, 0, 1e-3 + 1e-5 * n) for n in (10, 100, 1000)]
    steps = [DecodePoint(b, 100.0 * b, 1e-3 * b) for b in (1, 2, 3)]
    profile = fitted_profile(a_profile(), "mine", "http://x", Points(points, steps))
    path = f"{tmp_path}/mine.toml"
    with open(path, "w", encoding="utf-8") as file:
        file.write(as_toml(profile))
    assert load_profile(path) == profile
    assert profile.error.startswith("prefill within 0% for nine tenths of 3 prompts")


def test_points_far_off_do_not_move_the_fit() -> None:
    """Of 40 steps of 10 ms three were kept waiting, up to a second: 10 ms it is."""
    steps = [DecodePoint(1, 100.0, 0.01)] * 37 + [DecodePoint(1, 100.0, s) for s in (0.1, 0.5, 1)]
    decode = fit_decode(steps)
    assert decode.base_s + decode.sequence_s + decode.context_token_s * 100 == pytest.approx(
        0.01, rel=0.02
    )


def a_served_run(**changes: Any) -> Run:
    """Five busy minutes on 1P+1D in virtual time, as of a replay that saw each token."""
    config: ClusterConfig = msgspec.structs.replace(a_config(), block_tokens=512)
    requests = as_requests(open_trace("conversation-like:rate_rps=1,duration_s=300"), 1.0)
    simulate(config, a_profile(**{**SERVING, **changes}), requests, is_step_by_step=True)
    frame = request_frame(requests).with_columns(sent_s=pl.col("arrival_s"))
    spans = pl.DataFrame(span_columns(requests))
    info = RunInfo(name="served", source="live-modelled", system="disaggregated")
    return Run(info, frame, spans, pl.DataFrame(), {}, None)


SERVING: dict[str, Any] = {
    "prefill": {"base_s": 0.02, "token_s": 1e-5, "token2_s": 1e-10},
    "decode": {"base_s": 0.01, "sequence_s": 0.002, "context_token_s": 1e-7},
    "overheads": {"handover_s": 0.005, "handover_token_s": 1e-6},
    "link_bytes_per_s": 1e12,
    "device_kv_tokens": 10_000_000,
    "dram_kv_tokens": 10_000_000,
}


def test_a_served_run_gives_the_costs_that_it_had() -> None:
    """Prompts that waited for others, batches that came and went: the profile comes back."""
    found = fitted_profile(a_profile(), "found", "a run", served(a_served_run()))
    for section in ("prefill", "decode", "overheads"):
        for name, value in SERVING[section].items():
            assert getattr(getattr(found, section), name) == pytest.approx(value, rel=0.05), name


def test_a_run_without_a_servers_stamps_is_refused(tmp_path: Path) -> None:
    """A simulated run was served by nobody."""
    trace = open_trace("conversation-like:rate_rps=1,duration_s=20")
    simulate_trace(trace, a_config(), a_profile(), tmp_path / "run")
    with pytest.raises(RecordsError, match="no stamps of a live cluster"):
        served(read_run(tmp_path / "run"))


@pytest.mark.live
def test_a_modelled_endpoint_is_found_to_cost_what_its_profile_says() -> None:
    """Prefills of 20 to 100 ms, steps of 10 ms; a busy machine adds to them, none takes away."""
    base: Profile = a_profile(
        prefill={"base_s": 0.02, "token_s": 1e-4}, decode={"base_s": 0.01, "sequence_s": 0.001}
    )
    config: ClusterConfig = msgspec.structs.replace(
        a_config(prefill_instances=1, decode_instances=1), block_tokens=64
    )
    plan = ProbePlan(lengths=(64, 256, 768), hits=(), batches=(1, 3), contexts=(16,), repeats=3)
    with live(config, base) as (client, _):
        prefills, decodes, _ = asyncio.run(probe(str(client.base_url), plan))
    cost = CostModel(base)
    for point in prefills:
        expected_s = cost.prefill_s(point.input_tokens, 0)
        assert expected_s * 0.9 < point.ttft_s < expected_s + 0.2
    for step in decodes:
        expected_s = cost.step_s(step.batch, round(step.context_tokens))
        assert expected_s * 0.9 < step.step_s < expected_s * 4
