"""Are the papers' systems what their names say?"""

from __future__ import annotations

import msgspec
import pytest

from reference_cluster.config import load_config
from reference_cluster.cost_model import load_profile
from reference_cluster.presets import PRESETS, PROFILE


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("mooncake", "8P+8D"),
        ("vllm", "16 colocated, least-loaded"),
        ("vllm-prefix-caching", "16 colocated, prefix caching, least-loaded"),
        ("vllm-chunked", "16 colocated, chunked, least-loaded"),
    ],
)
def test_a_preset_is_a_valid_configuration(name: str, description: str) -> None:
    """Of the size of the paper's tests, on the profile that was calibrated for them."""
    config = load_config(None, PRESETS[name])
    assert config.description == description
    assert config.profile == PROFILE


CALIBRATED = (
    *("name", "source", "error", "prefill_error", "decode_error"),
    *("overheads", "chunk_factor"),
)


def test_the_end_to_end_profile_differs_by_its_overheads_alone() -> None:
    """The kernels are those of the profile it is built on."""
    kernels, end_to_end = load_profile("a800-llama3-70b"), load_profile(PROFILE)
    for field in msgspec.structs.fields(type(kernels)):
        if field.name not in CALIBRATED:
            assert getattr(kernels, field.name) == getattr(end_to_end, field.name), field.name
    assert end_to_end.overheads.step_s > 0


def test_there_is_one_set_of_overheads() -> None:
    """Calibrated once, used for the figures of both papers."""
    one, other = load_profile(PROFILE), load_profile("a800-llama2-70b")
    assert one.overheads == other.overheads
    assert one.chunk_factor == other.chunk_factor
