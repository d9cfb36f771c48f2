"""What was promised to a request, and how are times and shares written for people?"""

from __future__ import annotations

import math
import re

import msgspec

TBT_BOUNDS_S = (0.1, 0.2, 0.3)
"""The three TBT bounds of the Mooncake paper (FAST '25, section 5), in seconds."""

NOTHING = "\N{EN DASH}"
"""What stands where there is no number."""

_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_TERM = re.compile(r"(?P<what>[a-z][a-z0-9]*)\s*<=?\s*(?P<number>[0-9.eE+-]+)\s*(?P<unit>[a-z]*)")


class SloError(ValueError):
    """An SLO that cannot be read; the message is one line that says how to write it."""


class Slo(msgspec.Struct, frozen=True):
    """Upper bounds, in seconds, that a request must meet to count.

    `ttft_s` bounds the time from intended arrival to first token, `tbt_s` the request's TBT (the
    mean of its longest 10 % gaps between tokens). The defaults are the Mooncake paper's.
    """

    ttft_s: float = 30.0
    tbt_s: float = 0.1

    def __str__(self) -> str:
        return f"ttft<{format_seconds(self.ttft_s)},tbt<{format_seconds(self.tbt_s)}"


def parse_slo(text: str) -> Slo:
    """Read `"ttft<30s,tbt<100ms"`; a bound left out keeps its default.

    Bounds may be written `<` or `<=` (both are inclusive), with unit s, ms or us; a bare number is
    in seconds. Raises SloError.
    """
    return _with_defaults(_parse_bounds(text, text), Slo())


def parse_slos(text: str) -> tuple[Slo, dict[str, Slo]]:
    """Read `"chat:ttft<2s,tbt<50ms;batch:ttft<60s"`: the bounds of all, and those of classes.

    The part without a class (`"ttft<30s,tbt<100ms;batch:ttft<60s"`) holds for requests of no class
    or of one that is not named; a class's bound left out is taken from it. Raises SloError.
    """
    general: dict[str, float] | None = None
    classes: dict[str, dict[str, float]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, colon, bounds = (piece.strip() for piece in part.rpartition(":"))
        if colon and not name:
            raise SloError(f'SLO {text!r}: no class before ":"; write it like "chat:ttft<2s"')
        if (name in classes) if colon else (general is not None):
            raise SloError(f"SLO {text!r} gives {name or 'the general bounds'} twice; keep one")
        if colon:
            classes[name] = _parse_bounds(bounds, text)
        else:
            general = _parse_bounds(bounds, text)
    if general is None and not classes:
        _parse_bounds("", text)
    slo = _with_defaults(general or {}, Slo())
    return slo, {name: _with_defaults(bounds, slo) for name, bounds in classes.items()}


def format_seconds(value_s: float) -> str:
    """A bound as people write it: 0.1 -> '100ms', 30.0 -> '30s'."""
    if value_s < 1.0:
        return f"{value_s * 1e3:.12g}ms"
    return f"{value_s:.12g}s"


def seconds(value_s: float | None) -> str:
    """A measured time to three digits: '43.2 ms', '1.07 s'; a dash where there is none."""
    if value_s is None:
        return NOTHING
    if value_s == 0 or abs(value_s) >= 0.9995:
        return f"{_three_digits(value_s)} s"
    return f"{_three_digits(value_s * 1e3)} ms"


def percent(share: float | None) -> str:
    """A share as people say it, with more digits where little is left to 0 or 1: '99.96 %'."""
    if share is None:
        return NOTHING
    rest = min(abs(share), abs(1 - share))
    digits = 0 if rest < 5e-5 or rest >= 0.0195 else 1 if rest >= 0.00195 else 2
    return f"{share * 100:.{digits}f} %"


def _parse_bounds(text: str, whole: str) -> dict[str, float]:
    bounds: dict[str, float] = {}
    for term in text.split(","):
        what, value = _parse_term(term.strip().lower(), whole)
        if what in bounds:
            raise SloError(f"SLO {whole!r} bounds {what} twice; keep one of them")
        bounds[what] = value
    return bounds


def _with_defaults(bounds: dict[str, float], default: Slo) -> Slo:
    return Slo(bounds.get("ttft", default.ttft_s), bounds.get("tbt", default.tbt_s))


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _parse_term(term: str, text: str) -> tuple[str, float]:
    remedy = 'write it like "ttft<30s,tbt<100ms"'
    match = _TERM.fullmatch(term)
    if match is None:
        raise SloError(f"SLO {text!r}: {term!r} is not a bound; {remedy}")
    what, unit = match["what"], match["unit"] or "s"
    if what not in ("ttft", "tbt"):
        raise SloError(f"SLO {text!r}: {what!r} is not ttft or tbt; {remedy}")
    if unit not in _UNITS:
        raise SloError(f"SLO {text!r}: unit {unit!r} is not s, ms or us; {remedy}")
    try:
        value = float(match["number"]) * _UNITS[unit]
    except ValueError:
        raise SloError(f"SLO {text!r}: {match['number']!r} is not a number; {remedy}") from None
    if not (math.isfinite(value) and value > 0):
        raise SloError(f"SLO {text!r}: the bound of {what} must be above 0 s; {remedy}")
    # 100 * 1e-3 is 0.1 exactly after rounding away the product's last bits.
    return what, round(value, 12)
