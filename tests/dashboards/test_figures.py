"""Do the figures show the frames they are given, and nothing else?"""

import plotly.graph_objects as go
import polars as pl
import pytest

from dashboards import figures, theme
from dashboards.figures import Bar, Curve

CURVE = pl.DataFrame({"value_s": [0.5, 2.0], "share": [0.4, 0.8]})


def values(figure: go.Figure, trace: int, axis: str) -> list[float]:
    """What a trace of the figure shows along an axis."""
    return list(figure.data[trace][axis])


def test_a_cumulative_curve_stays_level_after_its_last_value() -> None:
    """A share that was not reached is drawn as not reached, out to the right edge."""
    figure = figures.cumulative([Curve("8P+8D", "#2b7bba", CURVE)], 30.0, "TTFT")
    assert values(figure, 0, "y") == [0.0, 0.4, 0.8, 0.8]
    assert values(figure, 0, "x")[-1] > 30.0
    assert [a.text for a in figure.layout.annotations] == ["SLO 30 s"]


def test_a_run_without_values_is_an_empty_curve() -> None:
    """Nothing finished: a line along zero, no error."""
    figure = figures.cumulative([Curve("none", "#2b7bba", CURVE.clear())], 0.1, "TBT")
    assert values(figure, 0, "y") == [0.0, 0.0]


def test_capacity_bars_carry_their_numbers() -> None:
    """One bar a run and bound, with its share written on it; None stays a gap."""
    figure = figures.capacity_bars(
        ["a", "b"], ["#2b7bba", "#d5681c"], [{"0.1": 0.97, "0.2": 1.0}, {"0.1": None, "0.2": 0.4}]
    )
    assert list(figure.data[0].text) == ["97 %", "100 %"]
    assert values(figure, 1, "y") == [None, 0.4]
    assert list(figure.data[0].x) == ["≤ 100 ms", "≤ 200 ms"]


def test_stages_nobody_spent_time_in_are_not_in_the_picture() -> None:
    """A stage of rounding noise only would be a name in the legend without a colour to see."""
    bars = [Bar("a", {"queue": 1.0, "transfer": 1e-17, "prefill": 2.0, "other": None})]
    assert figures.visible_stages(bars, figures.UNTIL_FIRST_TOKEN) == ["queue", "prefill"]
    figure = figures.stage_bars(bars, figures.UNTIL_FIRST_TOKEN)
    assert [trace.name for trace in figure.data] == ["queue", "prefill"]
    assert figure.layout.annotations[0].text.strip() == "3 s"


def test_bars_of_one_name_do_not_merge() -> None:
    """The position is the bar's own."""
    bars = [Bar("same", {"decode": 1.0}), Bar("same", {"decode": 2.0})]
    figure = figures.stage_bars(bars, figures.AFTER_FIRST_TOKEN)
    assert values(figure, 0, "y") == [0, 1]


def test_each_load_panel_has_the_limit_in_it() -> None:
    """A load that never comes near 1.0 must still show how far away the limit is."""
    frame = pl.DataFrame(
        {"time_s": [30.0, 90.0], "mean": [0.1, 0.2], "low": [0.0, 0.1], "high": [0.2, 0.3]}
    )
    figure = figures.load_over_time([Curve("p", "#2b7bba", frame), Curve("d", "#2b7bba", frame)])
    assert [shape.y0 for shape in figure.layout.shapes] == [1.0, 1.0]
    for axis in (figure.layout.yaxis, figure.layout.yaxis2):
        assert axis.range[0] == 0
        assert axis.range[1] > 1.0


def test_reasons_keep_their_colour_over_all_panels() -> None:
    """The legend is one for all runs."""
    frame = pl.DataFrame(
        {"time_s": [5.0, 5.0], "reason": ["ttft", "tbt"], "requests_per_s": [0.1, 0.2]}
    )
    curves = [Curve("a", "#2b7bba", frame), Curve("b", "#d5681c", frame.head(1))]
    colours = figures.reason_colours(curves)
    for trace in figures.refusals_over_time(curves, 10.0).data:
        assert trace.marker.color == colours[trace.name]


def test_a_system_has_its_colour_and_siblings_have_others() -> None:
    """Blue is disaggregated and orange colocated in every comparison, in whatever order."""
    assert theme.system_colours(["disaggregated", "colocated"]) == list(
        reversed(theme.system_colours(["colocated", "disaggregated"]))
    )
    assert len(set(theme.system_colours(["disaggregated"] * 3 + ["colocated"] * 2))) == 5


@pytest.mark.parametrize(("low", "high"), [(0.02, 0.3), (0.2, 60), (0.001, 4000), (20, 120)])
def test_a_time_axis_has_a_few_ticks_inside_its_range(low: float, high: float) -> None:
    """As many as fit side by side on a phone."""
    axis = theme.seconds_log_axis(low, high)
    ticks = axis["tickvals"]
    assert isinstance(ticks, list)
    assert 1 <= len(ticks) <= 7
    assert all(low <= tick <= high for tick in ticks)
