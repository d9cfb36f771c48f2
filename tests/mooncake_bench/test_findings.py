"""Are the sentences of a report true to the numbers, whichever way these point?"""

from collections.abc import Callable

import polars as pl
import pytest

from mooncake_bench import findings
from mooncake_bench.records import Run, write_run
from mooncake_bench.slo import Slo

ARun = Callable[..., Run]


def compared(*runs: Run) -> findings.Comparison:
    """The one comparison that these runs make."""
    (comparison,) = findings.comparisons(runs)
    return comparison


def test_the_headline_says_who_met_the_slo_for_how_many(a_run: ARun) -> None:
    """Shares, rate and ratio in the sentence are those of the summaries."""
    fast, slow = a_run("d"), a_run("c", system="colocated", slow=1.5)
    sentence = findings.headline(compared(fast, slow))
    ratio = fast.summary["goodput_rps"] / slow.summary["goodput_rps"]
    assert sentence.startswith(f"At {fast.summary['offered_rps']:.3g} req/s of")
    assert "of conversation-like, disaggregated 8P+8D met TTFT ≤ 30 s" in sentence
    assert "16 colocated for " in sentence
    assert sentence.endswith(f"{ratio:.2g} times the goodput.")
    assert "disaggregation pays" in findings.remarks(compared(fast, slow))[0]


def test_a_loss_is_called_a_loss(a_run: ARun) -> None:
    """Here the disaggregated cluster refuses a good part: the sentence does not flatter it."""
    comparison = compared(
        a_run("d", reject=0.4),
        a_run("c", source="simulated", system="colocated", slow=0.05),
    )
    assert comparison.sides[0].attainment < comparison.sides[1].attainment
    assert findings.verdict(comparison).startswith("0.")
    remarks = " ".join(findings.remarks(comparison))
    assert "disaggregation does not pay" in remarks
    assert "were rejected" in remarks


def test_a_difference_that_chance_explains_is_a_tie(a_run: ARun) -> None:
    """Two runs of one kind, a few more refused in one: no winner is named."""
    comparison = compared(
        a_run("d", requests=100, reject=0.1), a_run("c", requests=100, reject=0.13, instances=16)
    )
    assert findings.verdict(comparison) == "too close to call with 100 requests"


def test_no_goodput_on_either_side_is_said(a_run: ARun) -> None:
    """A bound nobody can meet: no ratio of zeros."""
    slo = Slo(30.0, 1e-6)
    comparison = compared(
        a_run("d", slo=slo, requests=40), a_run("c", system="colocated", slo=slo, requests=40)
    )
    assert findings.verdict(comparison) == "neither serves this load"
    assert "Neither system serves" in findings.remarks(comparison)[0]


def test_only_runs_of_the_same_requests_are_compared(a_run: ARun) -> None:
    """Live and simulated, other traces, other SLOs, other rates stand apart."""
    runs = [
        a_run("a", requests=30),
        a_run("b", requests=30, source="live-modelled"),
        a_run("c", requests=30, trace={"name": "other", "sha256": "0"}),
        a_run("d", requests=30, slo=Slo(1.0, 0.05)),
        a_run("e", requests=30, rps=9.0),
        a_run("f", requests=30, system="colocated"),
    ]
    sizes = [len(comparison.sides) for comparison in findings.comparisons(runs)]
    assert sizes == [2, 1, 1, 1, 1]


def test_runs_of_one_shape_go_by_their_own_names(a_run: ARun) -> None:
    """Two 8P+8D runs can only be told apart by what they were called."""
    comparison = compared(a_run("a", name="random"), a_run("b", name="kvcache-centric"))
    assert [side.short for side in comparison.sides] == [
        "8P+8D (random)",
        "8P+8D (kvcache-centric)",
    ]


def test_a_small_lead_is_called_small(a_run: ARun) -> None:
    """100 % against about 96 % of 2,000 requests: real, but not a reason to move."""
    comparison = compared(
        a_run("d", requests=2000, rps=0.5), a_run("c", requests=2000, rps=0.5, reject=0.04)
    )
    assert not findings.is_tie(*comparison.sides)
    assert findings.verdict(comparison).startswith("1.0")


def test_a_baseline_without_prefix_caching_is_said(a_run: ARun) -> None:
    """Otherwise the gain of reuse would be booked as the gain of disaggregation."""
    plain = a_run("c", requests=600, system="colocated")
    assert plain.directory is not None
    frame = plain.requests.with_columns(reused_tokens=pl.lit(0))
    plain = write_run(plain.directory, plain.info, frame, plain.spans, plain.samples)
    remarks = findings.remarks(compared(a_run("d", requests=600), plain))
    assert any(remark.startswith("16 colocated reused no prefix") for remark in remarks)


@pytest.mark.parametrize("config", [{}, {"prefill_instances": 2, "decode_instances": 2}])
def test_unequal_hardware_is_said(a_run: ARun, config: dict[str, int]) -> None:
    """4 instances against 8; the counts come from the configuration or, failing that, samples."""
    comparison = compared(
        a_run("d", instances=4, config=config), a_run("c", system="colocated", instances=8)
    )
    assert "Not the same hardware: disaggregated 2P+2D has 4 and 8 colocated has 8 instances." in (
        findings.remarks(comparison)
    )
