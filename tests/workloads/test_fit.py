"""`trace fit`: what is learned of a trace, what is made of it again, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from workloads.arrivals import arrivals as arriving
from workloads.errors import TraceError
from workloads.fit import Fitted, arrivals, fit, generated, open_fitted, write_fitted
from workloads.statistics import length_quantiles, prefix_hit_ratio
from workloads.trace import Trace, open_trace
from workloads.transform import jitter

CAPACITIES_TOKENS = (10**6, 3 * 10**6, 10**7, 3 * 10**7, None)


@pytest.fixture(scope="module")
def chat() -> Trace:
    return open_trace("conversation-like:duration_s=900")


@pytest.fixture(scope="module")
def fitted_chat(chat: Trace) -> Fitted:
    return fit(chat)


def test_a_fit_of_a_generator_finds_its_habits(chat: Trace, fitted_chat: Fitted):
    """Lengths, rate and reuse of what is generated again are those of the trace."""
    again = generated(fitted_chat, seed=7)
    assert again.frame.height == chat.frame.height
    for column in ("input_tokens", "output_tokens"):
        ours, theirs = length_quantiles(chat, column), length_quantiles(again, column)
        assert theirs["p50"] == pytest.approx(ours["p50"], rel=0.1)
        assert theirs["mean"] == pytest.approx(ours["mean"], rel=0.1)
    assert prefix_hit_ratio(again, None) == pytest.approx(prefix_hit_ratio(chat, None), abs=0.03)


def test_populations_are_told_apart():
    """Chat and two tools, each with its share and its system prompt."""
    fitted = fit(open_trace("toolagent-like:duration_s=900"))
    assert [one.system_tokens for one in fitted.populations] == [512, 6144, 2560]
    shares = [one.share for one in fitted.populations]
    assert shares == pytest.approx([0.465, 0.39, 0.145], abs=0.01)


def test_nothing_shared_stays_so():
    """No session and no common prompt is invented."""
    fitted = fit(open_trace("arxiv-summarization-like:duration_s=600"))
    assert [one.reuse for one in fitted.populations] == [0.0]
    assert prefix_hit_ratio(generated(fitted), None) == 0.0


def test_rates_follow_the_day():
    """Twice as much in the second half: four parts of 2/3, 2/3, 4/3, 4/3 of the mean."""
    first, second = np.linspace(0, 600, 200, endpoint=False), np.linspace(600, 1200, 401)
    rates, _ = arrivals(np.concatenate((first, second)))
    assert rates == pytest.approx((2 / 3, 2 / 3, 4 / 3, 4 / 3), rel=0.02)


@pytest.mark.parametrize(("burstiness", "low", "high"), [(1.0, 0.85, 1.2), (0.2, 0.15, 0.35)])
def test_bursts_are_seen(burstiness: float, low: float, high: float):
    """Gamma gaps of a shape are fitted with nearly that shape."""
    trace = open_trace("poisson-16k:rate_rps=5,duration_s=1200")
    bursty = arriving(trace, f"gamma:burstiness={burstiness}", 3)
    assert low < arrivals(bursty.frame["arrival_s"].to_numpy())[1] < high


def test_a_file_is_a_trace(fitted_chat: Fitted, tmp_path: Path):
    """Written and opened again it makes the same requests; rate and duration can be given."""
    path = tmp_path / "mine.toml"
    write_fitted(fitted_chat, path, "a note")
    assert open_fitted(path, seed=3).frame.equals(generated(fitted_chat, 3).frame)
    assert open_trace(str(path), seed=3).sha256 == generated(fitted_chat, 3).sha256
    short = open_trace(f"{path}:rate_rps=2,duration_s=100")
    assert short.frame.height == 200
    assert short.frame["arrival_s"][-1] <= 100


def test_no_row_is_kept(chat: Trace, fitted_chat: Fitted, tmp_path: Path):
    """A few kilobytes of tables, however long the trace."""
    write_fitted(fitted_chat, tmp_path / "mine.toml", "a note")
    assert (tmp_path / "mine.toml").stat().st_size < 4000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("version = 1|version = 9", "version 9"),
        ("burstiness = |burstines = ", "burstines"),
        ("duration_s = |duration_s = -", "not above 0"),
        ("version = 1|version", "anew"),
    ],
)
def test_a_broken_fit_is_one_line(fitted_chat: Fitted, tmp_path: Path, change: str, said: str):
    """Place and remedy."""
    path = tmp_path / "mine.toml"
    write_fitted(fitted_chat, path, "a note")
    before, _, after = change.partition("|")
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(TraceError, match=said) as raised:
        open_fitted(path)
    assert "\n" not in str(raised.value)


def test_too_little_to_fit():
    """A handful of requests has no distribution."""
    with pytest.raises(TraceError, match="at least 50"):
        fit(open_trace("poisson-16k:rate_rps=1,duration_s=20"))


def test_an_unknown_parameter_is_named(fitted_chat: Fitted, tmp_path: Path):
    path = tmp_path / "mine.toml"
    write_fitted(fitted_chat, path, "a note")
    with pytest.raises(TraceError, match="reuse"):
        open_trace(f"{path}:reuse=1")


def test_the_real_trace_comes_back(conversation: Trace):
    """Mooncake's hour: hits within 3 points at every cache size, lengths within 8 %."""
    real = jitter(conversation, 0)
    again = generated(fit(real), seed=5)
    for capacity in CAPACITIES_TOKENS:
        assert prefix_hit_ratio(again, capacity) == pytest.approx(
            prefix_hit_ratio(real, capacity), abs=0.03
        )
    for name in ("input_tokens", "output_tokens"):
        ours, theirs = length_quantiles(real, name), length_quantiles(again, name)
        for quantile in ("mean", "p50", "p90", "p99"):
            assert theirs[quantile] == pytest.approx(ours[quantile], rel=0.08)
    assert isinstance(again.frame["hash_ids"].dtype, pl.List)
