"""Are the closed forms right, and does the profile match the figures that it was fitted to?"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_cluster.cost_model import CostModel, load_profile, profile_names
from reference_cluster.engines.modelled import ModelledEngine
from reference_cluster.errors import ConfigError
from reference_cluster.policies.batching import chunks
from reference_cluster.virtual_time import run_virtual
from tests.reference_cluster.small import SMALL, a_profile, a_request, costs, write_profile

A800 = CostModel(load_profile("a800-llama3-70b"))
QUICK = settings(derandomize=True, deadline=None, max_examples=100)

# Figure 14 of the Mooncake FAST'25 paper: k tokens, 0 % and 95 % of them cached, seconds.
FIGURE_14 = [
    (8, 1.0, 0.135),
    (16, 2.053, 0.227),
    (32, 4.478, 0.406),
    (64, 10.585, 0.882),
    (128, 27.512, 2.328),
]


@pytest.mark.parametrize(("k_tokens", "uncached_s", "cached_s"), FIGURE_14)
def test_the_profile_is_within_its_stated_error(
    k_tokens: int, uncached_s: float, cached_s: float
) -> None:
    """4.3 % of every published point, where the paper's k is 1024 tokens."""
    tokens = k_tokens * 1024
    assert A800.prefill_s(tokens) == pytest.approx(uncached_s, rel=0.043)
    assert A800.prefill_s(tokens, round(0.95 * tokens)) == pytest.approx(cached_s, rel=0.043)


# Figure 2 of arXiv 2407.00079: k tokens, prefill latency over that of 128k tokens.
FIGURE_2 = [(8, 0.0337), (16, 0.0712), (32, 0.158), (64, 0.3729), (96, 0.6532), (128, 1.0)]


def test_the_llama2_profile_has_the_published_shape() -> None:
    """1.2 % of every point, as it says; its scale is LLaMA3-70B's at 128k tokens."""
    cost = CostModel(load_profile("a800-llama2-70b"))
    whole_s = cost.prefill_s(128 * 1024)
    assert whole_s == pytest.approx(27.512, rel=0.005)
    for k_tokens, share in FIGURE_2:
        assert cost.prefill_s(k_tokens * 1024) / whole_s == pytest.approx(share, rel=0.012)


def test_a_prefill_is_quadratic_in_the_prompt() -> None:
    """0.1 + 0.001 x 100 + 0.00001 x 100^2 = 0.3 s; the second half costs more than the first."""
    cost = costs(prefill={"token2_s": 1e-5})
    assert cost.prefill_s(100) == pytest.approx(0.3)
    assert cost.compute_s(0, 50) == pytest.approx(0.05 + 0.025)
    assert cost.compute_s(50, 100) == pytest.approx(0.05 + 0.075)


def test_reused_tokens_cost_their_loading_only() -> None:
    """0.1 + 0.001 x 40 + 60 x 0.0005 = 0.17 s; on the device they cost nothing."""
    profile = a_profile(prefill={"reused_token_s": 5e-4})
    assert CostModel(profile).prefill_s(100, 60) == pytest.approx(0.17)
    assert CostModel(profile, is_reuse_on_device=True).prefill_s(100, 60) == pytest.approx(0.14)


def test_a_step_is_linear_in_batch_and_context() -> None:
    """0.1 + 3 x 0.01 + 500 x 0.0001 = 0.18 s; beside a chunk of 0.2 s at factor 1.5: 0.48 s."""
    cost = costs(decode={"sequence_s": 0.01, "context_token_s": 1e-4}, chunk_factor=1.5)
    assert cost.step_s(3, 500) == pytest.approx(0.18)
    assert cost.mixed_step_s(3, 500, 0.2) == pytest.approx(0.48)


def test_every_step_pays_the_engines_overhead() -> None:
    """0.1 s of kernels and 0.05 s around them; beside a chunk of 0.2 s another 0.03 s."""
    cost = costs(overheads={"step_s": 0.05, "chunked_step_s": 0.03})
    assert cost.step_s(1, 100) == pytest.approx(0.15)
    assert cost.mixed_step_s(1, 100, 0.2) == pytest.approx(0.38)
    assert cost.span_s(1, 100, 4) == pytest.approx(0.6)
    assert cost.prefill_s(100) == pytest.approx(0.2)


def test_prefix_caching_pays_for_its_bookkeeping() -> None:
    """0.01 s a step and 0.02 s a prompt, only where it is on."""
    caching = {"prefix_caching_step_s": 0.01, "prefix_caching_prefill_s": 0.02}
    profile = a_profile(overheads=caching)
    on, off = (CostModel(profile, is_prefix_caching=is_on) for is_on in (True, False))
    assert (on.step_s(1, 1), on.prefill_s(100)) == pytest.approx((0.11, 0.22))
    assert (off.step_s(1, 1), off.prefill_s(100)) == pytest.approx((0.1, 0.2))


def test_a_span_is_the_sum_of_its_steps() -> None:
    """2 sequences with 100 tokens: steps of 0.11, 0.1102, 0.1104 s."""
    cost = costs(decode={"context_token_s": 1e-4})
    steps = [cost.step_s(2, 100 + 2 * done) for done in range(3)]
    assert steps == pytest.approx([0.11, 0.1102, 0.1104])
    assert cost.span_s(2, 100, 3) == pytest.approx(sum(steps))
    assert cost.growth_s(2) == pytest.approx(0.0002)


@QUICK
@given(
    batch=st.integers(1, 256),
    context_tokens=st.integers(1, 1_300_000),
    steps=st.integers(1, 20_000),
    context_token_s=st.sampled_from([0.0, 1e-12, 34.6e-9, 1e-6]),
)
def test_steps_within_undoes_span_s(
    batch: int, context_tokens: int, steps: int, context_token_s: float
) -> None:
    """However many steps a span has, its duration gives their number back, to 1e-9 of a step."""
    cost = costs(decode={"sequence_s": 1.5e-4, "context_token_s": context_token_s})
    elapsed_s = cost.span_s(batch, context_tokens, steps)
    done = cost.steps_within(batch, context_tokens, elapsed_s)
    assert done == pytest.approx(steps, abs=1e-9, rel=1e-12)
    assert cost.whole_steps_within(batch, context_tokens, elapsed_s) == steps
    half_s = cost.step_s(batch, context_tokens + batch * (steps - 1)) / 2
    assert cost.whole_steps_within(batch, context_tokens, elapsed_s - half_s) == steps - 1


@QUICK
@given(
    input_tokens=st.integers(1, 200_000),
    reused_share=st.floats(0.0, 1.0),
    chunk_tokens=st.sampled_from([1024, 8192, 100_000, 1_000_000]),
)
def test_the_chunks_of_a_prompt_add_up_to_its_prefill(
    input_tokens: int, reused_share: float, chunk_tokens: int
) -> None:
    """Cutting a prompt changes when a cancel acts, never how long the prefill takes."""

    async def chunked_s() -> float:
        engine = ModelledEngine(A800)
        request = a_request(input_tokens=input_tokens, block_tokens=512)
        request.reused_tokens = min(input_tokens - 1, int(reused_share * input_tokens))
        request.prefilled_tokens = request.reused_tokens
        total_s = 0.0
        for chunk in chunks(request, chunk_tokens):
            assert chunk.end - chunk.start <= chunk_tokens
            total_s += engine.chunk_s(chunk)
            request.prefilled_tokens = chunk.end
        assert total_s == pytest.approx(
            A800.prefill_s(input_tokens, request.reused_tokens), rel=1e-12
        )
        return total_s

    assert run_virtual(chunked_s()) > 0


def test_the_package_has_a_profile_with_its_source_and_error() -> None:
    """A modelled time is worth nothing without where it comes from and how wrong it is."""
    assert "a800-llama3-70b" in profile_names()
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name
        assert len(profile.source) > 20
        assert len(profile.error) > 20


def test_a_profile_can_be_a_file(tmp_path: Path) -> None:
    """What is written comes back; overrides go on top."""
    path = write_profile(tmp_path / "mine.toml")
    assert load_profile(str(path)) == SMALL
    assert load_profile(str(path), {"layers": 7}) == a_profile(layers=7)


def test_an_unknown_profile_names_those_there_are() -> None:
    """The remedy is in the message."""
    with pytest.raises(ConfigError, match=r"'a100'.*use one of .*a800-llama3-70b.*\.toml"):
        load_profile("a100")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"name = ", "mend the file"),
        (b"name = 'x'", "missing required field"),
        (b"\xff\xfe", "mend the file"),
        (b"name = 'x'\nspeed = 3", "speed|missing"),
    ],
)
def test_a_bad_profile_is_one_line_with_its_name(tmp_path: Path, text: bytes, problem: str) -> None:
    """Broken TOML, missing fields, not even text: never a traceback."""
    path = tmp_path / "bad.toml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_profile_file_is_named() -> None:
    """A path that leads nowhere says so."""
    with pytest.raises(ConfigError, match=r"nowhere\.toml: No such file"):
        load_profile("nowhere.toml")
