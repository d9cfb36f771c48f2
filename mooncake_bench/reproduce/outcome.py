"""How near is ours to the paper's? Numbers beside numbers, and what the picture shows."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

Point = tuple[float | str, float]


class Check(msgspec.Struct, frozen=True):
    """One number of the paper beside ours; `is_met` is None where nothing was demanded."""

    what: str
    published: str
    ours: str
    error: str = ""
    bound: str = ""
    is_met: bool | None = None
    # For the overview: relative error, or the difference of two shares; None where not comparable.
    error_points: float | None = None
    error_relative: float | None = None


class Series(msgspec.Struct, frozen=True):
    """One system's points in a picture. `kind` chooses the colour: disaggregated or colocated."""

    label: str
    kind: str
    published: Sequence[Point] = ()
    ours: Sequence[Point] = ()


class Picture(msgspec.Struct, frozen=True):
    """Lines over numbers, or bars over names."""

    title: str
    series: Sequence[Series]
    x: str = ""
    y: str = ""
    note: str = ""
    is_bars: bool = False
    is_log_x: bool = False
    is_log_y: bool = False
    is_share: bool = False  # y is a share, written in per cent.
    is_stepped: bool = False  # Dense curves over time: thin lines without markers.


class Outcome(msgspec.Struct, frozen=True):
    """What an experiment showed, and what it could not."""

    pictures: Sequence[Picture]
    checks: Sequence[Check]
    unmatched: Sequence[str] = ()


# ---- kinds of checks ---------------------------------------------------------------------------


def share(
    what: str, published: float | None, ours: float | None, within: float | None = None
) -> Check:
    """Two shares (of 1); the error is in points, `within` is the most allowed (of 1)."""
    if ours is None:
        return missing(what, "" if published is None else f"{published:.1%}")
    if published is None:
        return Check(what, "", f"{ours:.1%}")
    error = ours - published
    bound = "" if within is None else f"within {100 * within:g} points"
    is_met = None if within is None else abs(error) <= within
    shown = (f"{published:.1%}", f"{ours:.1%}", f"{100 * error:+.1f} points")
    return Check(what, *shown, bound, is_met, error_points=100 * error)


def number(
    what: str,
    published: float | None,
    ours: float | None,
    unit: str = "",
    within: float | None = None,
) -> Check:
    """Two numbers; the error is relative, `within` is the most allowed (.1 for 10 %)."""
    if ours is None:
        return missing(what, "" if published is None else show(published, unit))
    if published is None:
        return Check(what, "", show(ours, unit))
    error = ours / published - 1
    bound = "" if within is None else f"within {within:.0%}"
    is_met = None if within is None else abs(error) <= within
    shown = (show(published, unit), show(ours, unit), f"{error:+.1%}")
    return Check(what, *shown, bound, is_met, error_relative=error)


def exact(what: str, published: float, ours: float, within: float) -> Check:
    """Two numbers whose difference must be small."""
    error = ours - published
    is_met = abs(error) <= within
    shown = (f"{published:.3f}", f"{ours:.3f}", f"{error:+.4f}", f"within {within:g}")
    return Check(what, *shown, is_met, error_points=100 * error)


def between(
    what: str, published: float | None, ours: float | None, low: float, high: float, unit: str = ""
) -> Check:
    """A number that must lie in a range."""
    said = "" if published is None else show(published, unit)
    if ours is None:
        return missing(what, said)
    error = ours / published - 1 if published else None
    bound = f"{show(low, unit)} to {show(high, unit)}"
    shown = (said, show(ours, unit), "" if error is None else f"{error:+.1%}")
    return Check(what, *shown, bound, low <= ours <= high, error_relative=error)


def claim(
    what: str, is_met: bool, published: str = "", ours: str = "", bound: str = "must hold"
) -> Check:
    """Something that must be so."""
    return Check(what, published, ours or ("yes" if is_met else "no"), "", bound, is_met)


def told(what: str, published: str, ours: str) -> Check:
    """Words beside words."""
    return Check(what, published, ours)


def missing(what: str, published: str) -> Check:
    return Check(what, published, "none")


def show(value: float, unit: str) -> str:
    """Three or four significant digits, and the unit."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {unit}" if unit else text


def largest_error(checks: Sequence[Check]) -> str:
    """The largest error of each kind, as the overview says it."""
    points = [abs(c.error_points) for c in checks if c.error_points is not None]
    relative = [abs(c.error_relative) for c in checks if c.error_relative is not None]
    parts = [f"{max(points):.1f} points"] if points else []
    parts += [f"{max(relative):.0%}"] if relative else []
    return ", ".join(parts)
