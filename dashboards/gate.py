"""What did each repeat say? Every run as a dot, baseline beside candidate."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from dashboards import theme

BASELINE, CANDIDATE = theme.system_colours(("disaggregated", "colocated"))


def strip(
    baseline: Sequence[float], candidate: Sequence[float], bound: float | None, axis: str
) -> go.Figure:
    """One metric's runs; the dashed line is the bound that the candidate's estimate must keep."""
    figure = go.Figure()
    sides = (("baseline", baseline, BASELINE), ("candidate", candidate, CANDIDATE))
    for name, values, colour in sides:
        figure.add_scatter(
            x=list(values),
            y=[name] * len(values),
            mode="markers",
            marker={"color": colour, "size": 11, "opacity": 0.7, "line": {"width": 0}},
            hovertemplate=f"%{{x:.4g}}<extra>{name}</extra>",
        )
    if bound is not None:
        figure.add_vline(x=bound, line={"color": theme.QUIET, "width": 1.5, "dash": "4px,3px"})
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return theme.styled(figure, height=150, x=axis)
