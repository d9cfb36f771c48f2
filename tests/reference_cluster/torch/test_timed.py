"""Is an engine that runs alone in this process measured, prompts, prefixes and batches?"""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")

from mooncake_bench.calibrate.alone import alone  # noqa: E402
from mooncake_bench.calibrate.fit import fitted_profile  # noqa: E402
from mooncake_bench.calibrate.probe import ProbePlan  # noqa: E402
from reference_cluster.cost_model import load_profile  # noqa: E402
from reference_cluster.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.torch
CONFIG = """
block_tokens = 64
[prefill]
dram_tokens = 4096
[network]
transport = "shm"
[engine]
kind = "torch"
kv_tokens = 8192
page_tokens = 32
"""


def test_an_engine_alone_gives_points_of_all_that_was_planned(tmp_path: Path) -> None:
    """Longer prompts take longer, a prefix that is known saves most of its time."""
    path = tmp_path / "cluster.toml"
    path.write_text(CONFIG)
    plan = ProbePlan((64, 2048), (0.9,), (1, 4), (64,), steps=4, repeats=3)
    points = alone(path, plan)
    short, long, known = points.prefills
    assert [short.reused_tokens, long.reused_tokens, known.reused_tokens] == [0, 0, 1792]
    assert short.ttft_s < long.ttft_s
    assert known.ttft_s < long.ttft_s / 2
    assert [(one.batch, one.context_tokens) for one in points.decodes] == [(1, 66.0), (4, 264.0)]
    profile = fitted_profile(load_profile("tiny-torch-cpu"), "alone", "this test", points)
    assert profile.prefill.token_s > 0


def test_only_a_torch_engine_runs_here(tmp_path: Path) -> None:
    """A modelled one has nothing to be measured; several ranks are a live cluster's."""
    path = tmp_path / "cluster.toml"
    path.write_text("")
    with pytest.raises(ConfigError, match='is "modelled"; only torch'):
        alone(path, ProbePlan())
    path.write_text(CONFIG + "tensor_parallel = 2\n")
    with pytest.raises(ConfigError, match="probe the live cluster instead"):
        alone(path, ProbePlan())
