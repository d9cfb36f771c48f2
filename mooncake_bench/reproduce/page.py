"""How near is it, figure by figure? The results as one self-contained page, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import msgspec

from dashboards import page, reproduced, theme
from mooncake_bench.reproduce.errors import ReproduceError
from mooncake_bench.reproduce.experiment import Experiment
from mooncake_bench.reproduce.outcome import Check, Outcome, Picture, largest_error

TITLE = "Mooncake's figures, published and reproduced"


@dataclass(frozen=True, slots=True)
class Finding:
    """An experiment, judged: what it showed, from which workloads, and what it cost."""

    experiment: Experiment
    outcome: Outcome
    workloads: Sequence[str]  # In words; says where a generator stands in.
    runs: Sequence[tuple[str, dict[str, Any], float]]  # Name, plan, CPU seconds.

    @property
    def bound(self) -> list[Check]:
        """The checks with a bound."""
        return [check for check in self.outcome.checks if check.is_met is not None]

    @property
    def cpu_s(self) -> float:
        """CPU seconds of its runs, also of those that it shares with other figures."""
        return sum(cpu_s for _, _, cpu_s in self.runs)

    @property
    def verdict(self) -> str:
        met = sum(check.is_met is True for check in self.bound)
        if not self.bound:
            return "no bound given"
        return f"{met} of {len(self.bound)} within bounds"

    @property
    def in_short(self) -> tuple[str, str, str, str]:
        """Name, verdict, largest error, CPU seconds."""
        error = largest_error(self.outcome.checks)
        return self.experiment.name, self.verdict, error, f"{self.cpu_s:.1f}"


def write_page(findings: Sequence[Finding], out: Path) -> Path:
    """One HTML page that loads nothing from anywhere; raises ReproduceError if it cannot write."""
    foot = page.paragraph(FOOT, "small quiet")
    body = (
        f"<header><h1>{escape(TITLE)}</h1>{introduction(findings)}{overview(findings)}</header>"
        f"<main>{''.join(map(section, findings))}</main><footer>{foot}</footer>"
    )
    return written(out, page.document(TITLE, body))


def write_json(findings: Sequence[Finding], out: Path) -> Path:
    """The same as data: {figures: [{name, title, source, checks, pictures, ...}]}."""
    figures = [
        {
            "name": finding.experiment.name,
            "title": finding.experiment.title,
            "published_source": finding.experiment.published.get("source"),
            "text": finding.experiment.text,
            "workloads": list(finding.workloads),
            "verdict": finding.verdict,
            "cpu_s": round(finding.cpu_s, 3),
            "outcome": finding.outcome,
            "runs": [
                {"name": name, "plan": plan, "cpu_s": round(cpu_s, 3)}
                for name, plan, cpu_s in finding.runs
            ],
        }
        for finding in findings
    ]
    encoded = msgspec.json.format(msgspec.json.encode({"figures": figures}), indent=1)
    return written(out, encoded.decode())


def written(out: Path, text: str) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ReproduceError(f"{out}: cannot be written ({error.strerror}); choose --out") from None
    return out


# ---- the top -----------------------------------------------------------------------------------


def introduction(findings: Sequence[Finding]) -> str:
    checks = [check for finding in findings for check in finding.bound]
    met = sum(check.is_met is True for check in checks)
    stand_ins = dict.fromkeys(
        words for finding in findings for words in finding.workloads if "standing in" in words
    )
    parts = [
        page.paragraph(
            f"{met} of {len(checks)} bounds hold. Everything was simulated in virtual "
            "time from cost models of the papers' own machines: no GPU was used. Solid and filled "
            "is ours, dashed and open is published.",
            "headline",
        )
    ]
    if stand_ins:
        parts.append(page.paragraph(f"Not the real traces: {'; '.join(stand_ins)}.", "modelled"))
    return "".join(parts)


def overview(findings: Sequence[Finding]) -> str:
    """A line a figure, linked: how many bounds hold, the largest error, the CPU seconds."""
    items = []
    for finding in findings:
        name, verdict, error, cpu_s = finding.in_short
        said = "; ".join(filter(None, [verdict, error and f"largest error {error}"]))
        items.append(
            f'<li><a class="what" href="#{escape(name)}">{escape(finding.experiment.title)}</a>'
            f'<span class="verdict">{escape(said)}</span>'
            f'<span class="quiet">{cpu_s} CPU s</span></li>'
        )
    return f'<ul class="short">{"".join(items)}</ul>'


# ---- a figure ----------------------------------------------------------------------------------


def section(finding: Finding) -> str:
    one, outcome = finding.experiment, finding.outcome
    source = one.published.get("source")
    missed = [check for check in finding.bound if not check.is_met]
    parts = [
        f"<h2>{escape(one.title)}</h2>",
        page.paragraph(finding.verdict, "headline"),
        page.paragraph(one.text),
        page.paragraph(f"Workload: {in_brief(finding.workloads)}.", "quiet small"),
        page.paragraph(
            f"Published: {source}." if source else "Published: no numbers.", "quiet small"
        ),
    ]
    if missed:
        parts.append(page.banner("Out of bounds", [in_words(check) for check in missed]))
    parts += [
        page.figures(
            [
                drawn(picture, f"{one.name}-{place}", is_wide=len(outcome.pictures) == 1)
                for place, picture in enumerate(outcome.pictures)
            ]
        ),
        checks_table(outcome.checks),
    ]
    if outcome.unmatched:
        parts.append("<h3>What could not be matched</h3>")
        parts += [page.paragraph(text) for text in outcome.unmatched]
    configuration = msgspec.json.format(
        msgspec.json.encode([{"run": name, **plan} for name, plan, _ in finding.runs]), indent=1
    )
    if finding.runs:
        parts.append(
            page.folded(f"Configuration of {len(finding.runs)} runs", configuration.decode())
        )
    return f'<section class="comparison" id="{escape(one.name)}">{"".join(parts)}</section>'


def in_brief(workloads: Sequence[str]) -> str:
    """A few in full; of many, generators without their parameters, which the runs below have."""
    if len(workloads) <= WORKLOADS_IN_FULL:
        return "; ".join(workloads) or "none"
    return "; ".join(dict.fromkeys(words.partition(":")[0] for words in workloads))


WORKLOADS_IN_FULL = 3


def in_words(check: Check) -> str:
    published = f", published {check.published}" if check.published else ""
    return f"{check.what}: {check.ours}{published} ({check.bound})"


def checks_table(checks: Sequence[Check]) -> str:
    """The numbers; columns that would be empty are left out."""
    marks = {True: "met", False: "MISSED", None: ""}
    columns = {
        "published": [check.published for check in checks],
        "ours": [check.ours for check in checks],
        "error": [check.error for check in checks],
        "bound": [check.bound for check in checks],
        "": [marks[check.is_met] for check in checks],
    }
    shown = {head: cells for head, cells in columns.items() if any(cells)}
    rows = [
        (check.what, [cells[place] for cells in shown.values()])
        for place, check in enumerate(checks)
    ]
    return page.table("numbers", [(head, "") for head in shown], rows)


def drawn(picture: Picture, figure_id: str, is_wide: bool) -> str:
    colours = theme.system_colours(series.kind for series in picture.series)
    pairs = [
        reproduced.Pair(escape(series.label), colour, series.published, series.ours)
        for series, colour in zip(picture.series, colours, strict=True)
    ]
    if picture.is_bars:
        plot = reproduced.bars(
            pairs, picture.y, is_share=picture.is_share, is_log_y=picture.is_log_y
        )
    else:
        plot = reproduced.lines(
            pairs,
            picture.x,
            picture.y,
            is_log_x=picture.is_log_x,
            is_log_y=picture.is_log_y,
            is_share=picture.is_share,
            is_dense=picture.is_stepped,
        )
    legend = [(series.label, c) for series, c in zip(picture.series, colours, strict=True)]
    if any(series.published for series in picture.series):
        how = "open: published, filled: ours" if picture.is_bars else "dashed: published"
        legend.append((how, ""))
    return page.figure(plot, figure_id, picture.title, picture.note, legend=legend, wide=is_wide)


FOOT = (
    "Written by mooncake-bench reproduce. Numbers printed in the papers are marked so; digitised "
    "ones were read off the vector figures within 0.1 to 0.5 %. A figure's CPU seconds are those "
    "of all its runs, also of runs that it shares with other figures. This page loads nothing from "
    "the network."
)
