"""Profiles from kernel tables: the fit, its stated error, and the file that comes of it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from mooncake_bench.plan.errors import PlanError
from mooncake_bench.plan.spec import Tables
from mooncake_bench.plan.tables import fitted, profile_from, relative_fit, write_profile
from reference_cluster.cost_model import load_profile

H100 = Tables(
    system="h100_sxm",
    model="meta-llama/Meta-Llama-3.1-70B",
    layers=80,
    kv_bytes_per_token=327_680,
    device_kv_tokens=1_320_000,
)


class ClosedForm:
    """Answers in ms as aiconfigurator's engine does, from known coefficients."""

    def predict_prefill_latency(self, batch: int, tokens: int, reused: int) -> float:
        return 5.0 + 0.04 * tokens + 2e-7 * tokens**2

    def decode_step_latency(self, batch: int, context: int, output: int) -> float:
        return 10.0 + 0.02 * batch + 1e-5 * batch * context

    def mixed_step_breakdown(
        self, chunk: int, batch: int, context: int, output: int
    ) -> tuple[float, None]:
        prefill = 0.04 * chunk + 2e-7 * chunk**2
        return self.decode_step_latency(batch, context, output) + 1.5 * prefill, None


def test_coefficients_come_back():
    """What follows the closed form is fitted without error; chunks beside decodes cost 1.5."""
    profile = fitted(H100, ClosedForm())
    assert profile.prefill.base_s == pytest.approx(5e-3, rel=1e-6)
    assert profile.prefill.token_s == pytest.approx(4e-5, rel=1e-6)
    assert profile.decode.context_token_s == pytest.approx(1e-8, rel=1e-6)
    assert profile.chunk_factor == pytest.approx(1.5)
    assert (profile.prefill_error, profile.decode_error) == (0.0, 0.0)


def test_no_coefficient_is_negative():
    """Time does not shrink with a longer prompt: what would be below 0 is 0, the error says so."""
    terms = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    coefficients, error = relative_fit(terms, np.array([3.0, 2.0, 1.0]))
    assert coefficients[1] == 0.0
    assert error > 0.5


def test_the_file_is_a_profile(tmp_path: Path):
    """It reads back as what was fitted, wherever a profile is named."""
    path = write_profile(H100, tmp_path, lambda tables: fitted(tables, ClosedForm()))
    assert load_profile(str(path)) == fitted(H100, ClosedForm())


@pytest.mark.skipif(find_spec("aiconfigurator_core") is not None, reason="it is installed here")
def test_aiconfigurator_is_an_extra():
    """Without it, one line says what to install."""
    with pytest.raises(PlanError, match="aiconfigurator") as raised:
        profile_from(H100)
    assert "\n" not in str(raised.value)


def test_the_real_tables_give_the_shipped_profile():
    """The committed H100 profile was fitted to the same tables: within 5 % at 8k tokens."""
    pytest.importorskip("aiconfigurator_core", reason="needs the extra [aiconfigurator]")
    ours, shipped = profile_from(H100), load_profile("h100-llama3-70b")
    for tokens in (1024, 8192, 65536):
        times = [
            one.base_s + one.token_s * tokens + one.token2_s * tokens**2
            for one in (ours.prefill, shipped.prefill)
        ]
        assert times[0] == pytest.approx(times[1], rel=0.05)
