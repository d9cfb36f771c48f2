"""Which files does CI want? JUnit, Markdown, github-action-benchmark, Bencher, CSV, JSON, HTML."""

from __future__ import annotations

import csv
import datetime
import io
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec

from mooncake_bench.gate import words
from mooncake_bench.gate.errors import GateError
from mooncake_bench.gate.page import document
from mooncake_bench.gate.policy import Policy
from mooncake_bench.gate.verdict import Finding, Verdict, scenarios_of

MARKDOWN_ROWS_MAX = 80
COMMITS = ("GITHUB_SHA", "CI_COMMIT_SHA", "GIT_COMMIT")


def write_outputs(verdict: Verdict, policy: Policy, directory: Path) -> None:
    """Every format into the directory. Raises GateError where it cannot be written."""
    smaller, bigger = (github_benchmark(verdict, better) for better in ("smaller", "bigger"))
    texts = {
        "verdict.json": _json(
            {
                "outcome": verdict.outcome,
                "exit_code": verdict.exit_code,
                "headline": verdict.headline,
                **msgspec.to_builtins(verdict),
            }
        ),
        "summary.md": markdown(verdict).encode(),
        "junit.xml": junit(verdict),
        "github-smaller-is-better.json": _json(smaller),
        "github-bigger-is-better.json": _json(bigger),
        "bencher.json": _json(bencher(verdict)),
        "report.html": document(verdict, policy).encode(),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (directory / name).write_bytes(text)
    except OSError as error:
        raise GateError(
            f"{directory}: cannot be written ({error.strerror}); choose --out"
        ) from None


def append_step_summary(verdict: Verdict) -> None:
    """To GitHub's page of the job, where the gate runs in one."""
    place = os.environ.get("GITHUB_STEP_SUMMARY")
    if not place:
        return
    try:
        with Path(place).open("a", encoding="utf-8") as file:
            file.write(markdown(verdict))
    except OSError as error:
        raise GateError(f"$GITHUB_STEP_SUMMARY {place}: {error.strerror}; unset it") from None


def markdown(verdict: Verdict) -> str:
    """The verdict and what is worth seeing, as tables."""
    lines = [f"### {verdict.headline}", "", verdict.setting, *verdict.remarks, ""]
    shown = [one for one in verdict.findings if verdict.tier == 2 or one.outcome != "pass"]
    for scenario in scenarios_of(shown[:MARKDOWN_ROWS_MAX]):
        lines += [f"**{_cell(scenario)}**", ""] if scenario else []
        lines += [f"| {' | '.join(words.HEADS)} |", f"|{' --- |' * len(words.HEADS)}"]
        rows = [one for one in shown[:MARKDOWN_ROWS_MAX] if one.scenario == scenario]
        lines += [f"| {' | '.join(map(_cell, words.cells(one)))} |" for one in rows] + [""]
    if len(shown) > MARKDOWN_ROWS_MAX:
        lines += [f"... and {len(shown) - MARKDOWN_ROWS_MAX} more.", ""]
    if verdict.exit_code and verdict.locally:
        lines += [f"To see it: `{verdict.locally}`", ""]
    return "\n".join(lines) + "\n"


def junit(verdict: Verdict) -> bytes:
    """A suite a scenario, a case a metric; too noisy is an error, as it is no failure."""
    root = ElementTree.Element("testsuites", name="mooncake-bench gate")
    for scenario in scenarios_of(verdict.findings):
        cases = [one for one in verdict.findings if one.scenario == scenario]
        counts = {
            "name": scenario or "live",
            "tests": str(len(cases)),
            "failures": str(sum(one.outcome == "breached" for one in cases)),
            "errors": str(sum(one.outcome == "too noisy" for one in cases)),
        }
        suite = ElementTree.SubElement(root, "testsuite", counts)
        for one in cases:
            _case(suite, one, scenario or "live")
    found: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return found


def _case(suite: ElementTree.Element, one: Finding, scenario: str) -> None:
    case = ElementTree.SubElement(
        suite,
        "testcase",
        classname=f"gate.{scenario}",
        name=one.rule if one.rule != "unchanged" else one.metric,
    )
    text = (
        f"{one.metric}: {words.value(one.metric, one.baseline)} -> "
        f"{words.value(one.metric, one.candidate)}, {words.change(one)}; {one.why}"
    )
    tag = {"breached": "failure", "too noisy": "error"}.get(one.outcome)
    if tag is not None:
        ElementTree.SubElement(case, tag, message=text, type=one.outcome)
    else:
        ElementTree.SubElement(case, "system-out").text = text


def github_benchmark(verdict: Verdict, better: str) -> list[dict[str, Any]]:
    """For benchmark-action/github-action-benchmark: customSmallerIsBetter, customBiggerIsBetter."""
    return [
        {
            "name": " / ".join(filter(None, (one.scenario, one.metric))),
            "unit": words.unit(one.metric) or "count",
            "value": one.candidate,
            "range": _range(one),
            "extra": f"{words.SIGNS[one.outcome]}: {one.why}",
        }
        for one in _measures(verdict)
        if one.better == better
    ]


def bencher(verdict: Verdict) -> dict[str, dict[str, dict[str, float]]]:
    """Bencher Metric Format; lower and upper are the least and the most of the runs."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for one in _measures(verdict):
        assert one.candidate is not None
        measure = {"value": one.candidate}
        if one.candidate_runs:
            measure["lower_value"] = min(one.candidate_runs)
            measure["upper_value"] = max(one.candidate_runs)
        found.setdefault(one.scenario or "live", {})[one.metric] = measure
    return found


def append_series(verdict: Verdict, path: Path) -> None:
    """A row of candidate values with time and commit, for change-point tools (Apache Otava's CSV).

    Raises GateError where the file has other columns: a series is of one policy.
    """
    row = {
        "time": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S +0000"),
        "commit": next(filter(None, map(os.environ.get, COMMITS)), ""),
    }
    for one in _measures(verdict):
        row["/".join(filter(None, (one.scenario, one.metric)))] = repr(one.candidate)
    try:
        old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(row), lineterminator="\n")
        writer.writeheader()
        if old and next(csv.reader(old[:1])) != list(row):
            raise GateError(f"{path}: has other columns; give each policy a series of its own")
        writer.writerow(row)
        lines = buffer.getvalue().splitlines()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines[1:] if old else lines) + "\n")
    except OSError as error:
        raise GateError(f"{path}: {error.strerror}; choose another --series") from None


def _measures(verdict: Verdict) -> list[Finding]:
    """A finding a metric and scenario: the first of those that have a value."""
    by_name: dict[tuple[str, str], Finding] = {}
    for one in verdict.findings:
        if one.candidate is not None and one.metric != "decisions":
            by_name.setdefault((one.scenario, one.metric), one)
    return list(by_name.values())


def _range(one: Finding) -> str:
    if len(one.candidate_runs) < 2:
        return ""
    return f"{min(one.candidate_runs):.4g} to {max(one.candidate_runs):.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
