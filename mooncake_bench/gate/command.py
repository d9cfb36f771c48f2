"""What can be typed to gate? gate --baseline A --candidate B --policy P | gate record"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from mooncake_bench.gate import baselines, likeness
from mooncake_bench.gate.errors import GateError, Invalid
from mooncake_bench.gate.evidence import Evidence
from mooncake_bench.gate.exact import judge_exactly, recorded
from mooncake_bench.gate.golden import is_golden, read_golden, write_golden
from mooncake_bench.gate.policy import Policy, read_policy
from mooncake_bench.gate.repeat import Repeater
from mooncake_bench.gate.repeated import Batch, check_repeats, doubtful, judge, judge_again
from mooncake_bench.gate.verdict import INVALID, Finding, Verdict

results = Console()
diagnostics = Console(stderr=True)
SEE_HELP = "see mooncake-bench gate --help"


class ManyValues(TyperGroup):
    """Options that take several values at once, as a shell's glob gives them: --baseline runs/a*"""

    many = ("--baseline", "--candidate", "--allow")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        expanded: list[str] = []
        option, has_value = "", False
        for arg in args:
            if arg.startswith("--"):
                option, has_value = (arg if arg in self.many else ""), False
            elif option:
                expanded += [option] if has_value else []
                has_value = True
            expanded.append(arg)
        return super().parse_args(ctx, expanded)


gate_app = typer.Typer(cls=ManyValues, invoke_without_command=True)
Scenarios = Annotated[
    Path | None, typer.Option(help="TOML of scenarios to run in virtual time, compared exactly")
]
Workers = Annotated[int, typer.Option(min=1, help="scenarios at a time, a process each")]


@gate_app.callback()
def gate(
    ctx: typer.Context,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="run directories, a recorded baseline, git:BRANCH[:PATH]; several"),
    ] = None,
    candidate: Annotated[
        list[str] | None, typer.Option(help="run directories of what is to be judged; several")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="gate.toml; none: the usual metrics")] = None,
    scenarios: Scenarios = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON, JUnit, Markdown, Bencher, github-action-benchmark, HTML; new runs"
        ),
    ] = None,
    series: Annotated[
        Path | None, typer.Option(help="CSV to append a row to, for change-point tools")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help=f"may differ: {', '.join(likeness.ASPECTS)}, all")
    ] = None,
    workers: Workers = 2,
) -> None:
    """Did it get worse? A verdict with its reasons, and an exit code for CI.

    0 pass, 2 bad input, 3 invalid runs, 4 too noisy for a verdict, 99 breached. Scenarios and
    simulated runs are compared exactly; live runs are repeated, the run being the sample, and
    repeated once more before anything fails.
    """
    if ctx.invoked_subcommand is not None:
        return
    try:
        rules = read_policy(policy)
        if scenarios is not None:
            verdict = gate_scenarios(scenarios, one_place(baseline), rules, workers)
        else:
            verdict = gate_runs(baseline or [], candidate or [], rules, allow or [], out)
    except Invalid as error:
        diagnostics.print(
            f"mooncake-bench: {error}", style="red", highlight=False, soft_wrap=True, markup=False
        )
        raise typer.Exit(INVALID) from None
    publish(verdict, rules, out, series)
    raise typer.Exit(verdict.exit_code)


@gate_app.command()
def record(
    runs: Annotated[list[str] | None, typer.Argument(help="run directories to keep")] = None,
    scenarios: Scenarios = None,
    to: Annotated[str, typer.Option(help="a directory, or git:BRANCH[:PATH]")] = "baseline",
    message: Annotated[str, typer.Option(help="why it moves, for git")] = "Baseline of the gate",
    workers: Workers = 2,
) -> None:
    """Move a baseline on purpose; prints what changes, old and new, and how noisy it is."""
    if bool(runs) == (scenarios is not None):
        raise GateError(
            "give run directories or --scenarios; see mooncake-bench gate record --help"
        )
    if scenarios is not None:
        record_scenarios(scenarios, to, message, workers)
    else:
        record_runs(runs or [], to, message)
    say(f"written to {to}")


def publish(verdict: Verdict, policy: Policy, out: Path | None, series: Path | None) -> None:
    """To the terminal, to GitHub's job page, and to the files that were asked for."""
    from mooncake_bench.gate import outputs
    from mooncake_bench.gate.show import show

    show(verdict, results)
    outputs.append_step_summary(verdict)
    if series is not None:
        outputs.append_series(verdict, series)
    if out is not None:
        outputs.write_outputs(verdict, policy, out)
        say(f"written to {out}")


def say(line: str) -> None:
    results.print(line, highlight=False, soft_wrap=True, markup=False)


def one_place(places: Sequence[str] | None) -> str:
    if not places or len(places) > 1:
        raise GateError(f"--baseline: name the one directory that holds the scenarios'; {SEE_HELP}")
    return places[0]


# ---- tier 1 ----------------------------------------------------------------------------------


def gate_scenarios(path: Path, baseline: str, policy: Policy, workers: int) -> Verdict:
    """Run every scenario and compare it exactly with what is recorded."""
    from mooncake_bench.gate.scenarios import read_scenarios, run_scenarios

    scenarios = read_scenarios(path)
    with baselines.opened(baseline) as directory:
        before = read_golden(directory)
    findings: list[Finding] = []
    numbers = requests = 0
    for outcome in run_scenarios(scenarios, workers):
        old, new = recorded(before, outcome).evidence, outcome.evidence
        findings += judge_exactly(old, new, policy, outcome.scenario.name)
        numbers += len(new.numbers) + 1
        requests += len(outcome.decisions)
    command = f"--scenarios {path} --baseline {baseline}"
    return Verdict(
        tier=1,
        findings=findings,
        numbers=numbers,
        setting=f"{len(scenarios)} scenarios in virtual time, {requests:,} requests, "
        f"compared exactly with {baseline}.",
        locally=f"mooncake-bench gate {command} (if the change is meant: mooncake-bench "
        f"gate record --scenarios {path} --to {baseline}, and commit it with the reason)",
    )


def record_scenarios(path: Path, to: str, message: str, workers: int) -> None:
    """Run every scenario and keep it; what moves is shown, old and new."""
    from mooncake_bench.gate.scenarios import read_scenarios, run_scenarios
    from mooncake_bench.gate.show import table

    scenarios = read_scenarios(path)
    usual = read_policy(None)
    before = {}
    if known(to):
        with baselines.opened(to) as directory:
            before = read_golden(directory) if is_golden(directory) else {}
    outcomes = list(run_scenarios(scenarios, workers))
    for outcome in outcomes:
        name = outcome.scenario.name
        if name not in before:
            say(f"{name}: new")
            continue
        found = judge_exactly(before[name].evidence, outcome.evidence, usual, name)
        moved = [one for one in found if one.outcome != "pass"]
        results.print(table(name, moved) if moved else f"{name}: as it was", highlight=False)
    for name in before.keys() - {one.name for one in scenarios}:
        say(f"{name}: dropped")
    with baselines.written(to, message) as directory:
        write_golden(outcomes, directory)


# ---- runs ------------------------------------------------------------------------------------


def gate_runs(
    baseline: Sequence[str],
    candidate: Sequence[str],
    policy: Policy,
    allow: Sequence[str],
    out: Path | None,
) -> Verdict:
    """Judge given runs, or runs made by the policy's commands."""
    given = None
    if baseline and candidate:
        given = Batch(baselines.read_side(baseline), baselines.read_side(candidate))
        remarks = validate(given, allow)
        if given.baseline[0].is_simulated:
            return gate_simulated(given, policy, remarks)
    elif baseline or candidate or not (policy.runs.baseline and policy.runs.candidate):
        missing = "--candidate" if baseline else "--baseline"
        raise GateError(f"{missing} is missing (or [runs] commands in the policy); {SEE_HELP}")
    with tempfile.TemporaryDirectory() as scratch, diagnostics.status("running") as status:
        directory = Path(scratch) if out is None else out / "runs"
        repeater = Repeater(policy.runs, given, directory, status.update)
        return gate_repeated(given, policy, allow, repeater)


def validate(batch: Batch, allow: Sequence[str]) -> list[str]:
    """What was forced, in words; raises Invalid for what may not be compared."""
    likeness.check_valid([*batch.baseline, *batch.candidate])
    return likeness.check_alike(batch.baseline, batch.candidate, allow)


def gate_simulated(batch: Batch, policy: Policy, remarks: list[str]) -> Verdict:
    """Runs in virtual time, in pairs: each baseline run with the candidate run in its place."""
    if len(batch.baseline) != len(batch.candidate):
        raise Invalid(
            f"{len(batch.baseline)} simulated runs against {len(batch.candidate)}: they are "
            "compared one by one; give as many of each"
        )
    findings: list[Finding] = []
    for old, new in zip(batch.baseline, batch.candidate, strict=True):
        name = new.name if len(batch.baseline) > 1 else ""
        findings += judge_exactly(old, new, policy, name)
    return Verdict(
        tier=1,
        findings=findings,
        numbers=sum(len(one.numbers) + 1 for one in batch.candidate),
        setting=f"Simulated, compared exactly: {names(batch.candidate)} with "
        f"{names(batch.baseline)}.",
        remarks=remarks,
        locally=f"mooncake-bench compare {batch.baseline[0].name} {batch.candidate[0].name}",
    )


def gate_repeated(
    given: Batch | None, policy: Policy, allow: Sequence[str], repeater: Repeater
) -> Verdict:
    """Judge repeats; what seems breached is repeated once more where that is possible."""
    first = given or repeater.batch("first", policy.runs.repeats)
    remarks = validate(first, allow)
    check_repeats(first, policy)
    findings, batch = judge(first, policy), first
    checks = doubtful(first, policy, findings) if policy.runs.confirm else []
    if checks and repeater.can_repeat:
        second = repeater.batch("second", policy.runs.repeats)
        batch = first + second
        remarks = validate(batch, allow)
        findings = judge_again(findings, checks, first, second, policy)
        doubted = ", ".join(check.metric for check in checks)
        remarks.append(f"In doubt and repeated, both sides in turn: {doubted}.")
    elif checks:
        remarks.append("In doubt and not repeated: the policy has no [runs] commands, no rerun.")
    gated = policy.of("gate")
    return Verdict(
        tier=2,
        findings=findings,
        numbers=len(gated),
        setting=f"{len(batch.candidate)} live runs ({names(batch.candidate)}) against "
        f"{len(batch.baseline)} ({names(batch.baseline)}); {len(gated)} metrics decide.",
        remarks=remarks,
        locally=f"mooncake-bench compare {batch.baseline[0].name} {batch.candidate[0].name}",
    )


def names(runs: Sequence[Evidence]) -> str:
    if len(runs) == 1:
        return runs[0].name
    return f"{runs[0].name} .. {Path(runs[-1].name).name}"


def record_runs(places: Sequence[str], to: str, message: str) -> None:
    """Keep runs as a baseline; shows old, new and noise of the usual metrics."""
    from mooncake_bench.gate.show import noise_table

    new = baselines.read_side(places)
    likeness.check_valid(new)
    old = _kept(to)
    results.print(noise_table(old, new, read_policy(None)), highlight=False)
    directories = []
    for place in places:
        directories += baselines.run_directories(Path(place), place)
    with baselines.written(to, message) as directory:
        baselines.keep_runs(directories, directory)


def _kept(to: str) -> list[Evidence]:
    """The runs of the baseline that is there already, if one is."""
    if not known(to):
        return []
    with baselines.opened(to) as directory:
        if not any(directory.glob("*/run.json")):
            return []
    return baselines.read_side([to])


def known(to: str) -> bool:
    """Whether there is a baseline at the place already."""
    if not to.startswith(baselines.GIT):
        return Path(to).exists()
    branch, path = baselines.branch_and_path(to)
    return bool(
        baselines.git(
            "rev-parse", "--verify", "--quiet", f"refs/heads/{branch}:{path}", may_fail=True
        )
    )
