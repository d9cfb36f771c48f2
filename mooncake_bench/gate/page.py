"""How does a verdict look as a page? The reasons first, every run as a dot, then all findings."""

from __future__ import annotations

from html import escape

from dashboards import gate as figures
from dashboards import page
from mooncake_bench.gate import words
from mooncake_bench.gate.policy import Check, Policy
from mooncake_bench.gate.verdict import Finding, Outcome, Verdict, scenarios_of

ORDER: tuple[Outcome, ...] = ("breached", "too noisy", "pass", "observed")


def document(verdict: Verdict, policy: Policy) -> str:
    """One self-contained page."""
    title = "Did it get worse?"
    body = [
        f"<header><h1>{title}</h1>",
        page.paragraph(verdict.headline, "headline"),
        page.paragraph(verdict.setting, "quiet"),
        *[page.paragraph(remark, "quiet") for remark in verdict.remarks],
        _alarm(verdict),
        page.paragraph(f"To see it: {verdict.locally}", "small quiet")
        if verdict.exit_code and verdict.locally
        else "",
        "</header><main>",
        _strips(verdict, policy),
        *[_section(scenario, verdict) for scenario in scenarios_of(verdict.findings)],
        f"</main><footer>{_WORDS}</footer>",
    ]
    return page.document(title, "".join(body))


def _alarm(verdict: Verdict) -> str:
    breached = verdict.of("breached")
    if not breached:
        return ""
    lines = [
        f"{one.scenario + ': ' if one.scenario else ''}{one.metric} {words.change(one)}; {one.why}"
        for one in breached[:12]
    ]
    if len(breached) > 12:
        lines.append(f"and {len(breached) - 12} more, below")
    return page.banner("What was breached", lines)


def _strips(verdict: Verdict, policy: Policy) -> str:
    """A figure for every metric of which there are repeats."""
    checks = {check.rule: check for check in policy.checks}
    shown = [one for one in verdict.findings if one.baseline_runs and one.rule in checks]
    parts = [
        page.figure(
            figures.strip(
                one.baseline_runs, one.candidate_runs, _bound(one, checks[one.rule]), one.metric
            ),
            f"strip{index}",
            f"{one.metric}: {words.SIGNS[one.outcome]}",
            f"Every dot is a run. {words.change(one)} ({words.interval(one)}); dashed: the bound.",
            wide=len(shown) == 1,
        )
        for index, one in enumerate(shown)
    ]
    return f"<h3>Every run</h3>{page.figures(parts)}" if parts else ""


def _bound(finding: Finding, check: Check) -> float | None:
    return check.bound(finding.baseline) if finding.baseline is not None else None


def _section(scenario: str, verdict: Verdict) -> str:
    found = [one for one in verdict.findings if one.scenario == scenario]
    found.sort(key=lambda one: ORDER.index(one.outcome))
    heads = [(head, "") for head in words.HEADS[1:]]
    rows = [(one.metric, words.cells(one)[1:]) for one in found]
    title = scenario or "Every metric"
    return f"<h3>{escape(title)}</h3>{page.table('facts', heads, rows)}"


_WORDS = """<h3>Words</h3><dl class="small">
<dt>Change</dt><dd>Of the candidate's estimate against the baseline's: the best of the repeats, or
their median.</dd>
<dt>95 %</dt><dd>Interval of the change; whole runs are drawn anew, then parts of each.</dd>
<dt>Breached</dt><dd>Beyond the bound, and by more than chance between identical sides (exact
one-sided test on runs, adjusted for the number of metrics) and, live, in a second batch too.</dd>
<dt>Too noisy</dt><dd>Identical runs differ by more than the bound: no verdict.</dd></dl>
<p class="small quiet">Written by mooncake-bench. This page loads nothing from the network.</p>"""
