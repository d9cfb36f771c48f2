"""What can be typed to gate? gate --baseline A --candidate B --policy P | gate record"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from mooncake_bench.gate.errors import GateError, Invalid
from mooncake_bench.gate.policy import Policy, read_policy
from mooncake_bench.gate.verdict import INVALID, Finding, Verdict

results = Console()
diagnostics = Console(stderr=True)


class ManyValues(TyperGroup):
    """Options that take several values at once, as a shell's glob gives them: --baseline runs/a*"""

    many = ("--baseline", "--candidate", "--allow")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        expanded: list[str] = []
        option = ""
        for arg in args:
            if arg.startswith("-") or (option == "" and not expanded):
                option = arg if arg in self.many else ""
                expanded.append(arg)
            elif option and expanded[-1] != option:
                expanded += [option, arg]
            else:
                expanded.append(arg)
        return super().parse_args(ctx, expanded)


gate_app = typer.Typer(
    cls=ManyValues,
    invoke_without_command=True,
    help="Did it get worse? A verdict on runs against a baseline, and an exit code: 0 pass, 2 bad "
    "input, 3 invalid runs, 4 too noisy, 99 breached. Scenarios in virtual time are compared "
    "exactly; live runs are repeated, and repeated again before anything fails.",
)
Scenarios = Annotated[
    Path | None, typer.Option(help="TOML of scenarios to run in virtual time and compare exactly")
]
Workers = Annotated[int, typer.Option(min=1, help="scenarios at a time, a process each")]


@gate_app.callback()
def gate(
    ctx: typer.Context,
    baseline: Annotated[
        list[str] | None, typer.Option(help="run directories, or a recorded baseline")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="gate.toml; none: usual metrics")] = None,
    scenarios: Scenarios = None,
    workers: Workers = 2,
) -> None:
    """Did it get worse? A verdict with its reasons, and an exit code for CI."""
    if ctx.invoked_subcommand is not None:
        return
    try:
        rules = read_policy(policy)
        if scenarios is None or not baseline:
            raise GateError(
                "--baseline and --scenarios are missing; see mooncake-bench gate --help"
            )
        verdict = gate_scenarios(scenarios, Path(baseline[0]), rules, workers)
    except Invalid as error:
        diagnostics.print(
            f"mooncake-bench: {error}", style="red", highlight=False, soft_wrap=True, markup=False
        )
        raise typer.Exit(INVALID) from None
    from mooncake_bench.gate.show import show

    show(verdict, results)
    raise typer.Exit(verdict.exit_code)


@gate_app.command()
def record(
    scenarios: Scenarios = None,
    to: Annotated[str, typer.Option(help="directory of the baseline")] = "baseline",
    workers: Workers = 2,
) -> None:
    """Move a baseline on purpose; prints what changes, old and new."""
    if scenarios is None:
        raise GateError("--scenarios is missing; see mooncake-bench gate record --help")
    record_scenarios(scenarios, Path(to), workers)


def gate_scenarios(path: Path, baseline: Path, policy: Policy, workers: int) -> Verdict:
    """Run every scenario and compare it exactly with what is recorded."""
    from mooncake_bench.gate.exact import judge_exactly, recorded
    from mooncake_bench.gate.golden import read_golden
    from mooncake_bench.gate.scenarios import read_scenarios, run_scenarios

    scenarios = read_scenarios(path)
    before = read_golden(baseline)
    findings: list[Finding] = []
    numbers = 0
    for outcome in run_scenarios(scenarios, workers):
        old, new = recorded(before, outcome).evidence, outcome.evidence
        findings += judge_exactly(old, new, policy, outcome.scenario.name)
        numbers += len(new.numbers) + 1
    requests = sum(len(before[one.name].decisions) for one in scenarios)
    return Verdict(
        tier=1,
        findings=findings,
        numbers=numbers,
        setting=f"{len(scenarios)} scenarios in virtual time, {requests:,} requests, "
        f"compared exactly with {baseline}.",
        locally=f"mooncake-bench gate --scenarios {path} --baseline {baseline}; if the change is "
        f"meant: mooncake-bench gate record --scenarios {path} --to {baseline}",
    )


def record_scenarios(path: Path, to: Path, workers: int) -> None:
    """Run every scenario and keep it; what moves is shown, old and new."""
    from mooncake_bench.gate.exact import judge_exactly
    from mooncake_bench.gate.golden import is_golden, read_golden, write_golden
    from mooncake_bench.gate.scenarios import read_scenarios, run_scenarios
    from mooncake_bench.gate.show import table

    scenarios = read_scenarios(path)
    before = read_golden(to) if is_golden(to) else {}
    usual = read_policy(None)
    outcomes = []
    for outcome in run_scenarios(scenarios, workers):
        outcomes.append(outcome)
        name = outcome.scenario.name
        if name not in before:
            results.print(f"{name}: new", highlight=False, soft_wrap=True)
            continue
        found = judge_exactly(before[name].evidence, outcome.evidence, usual, name)
        moved = [one for one in found if one.outcome != "pass"]
        results.print(table(name, moved) if moved else f"{name}: as it was", highlight=False)
    for name in before:
        if name not in {one.scenario.name for one in outcomes}:
            results.print(f"{name}: dropped", highlight=False, soft_wrap=True)
    write_golden(outcomes, to)
    results.print(f"written to {to}; commit it with the reason", highlight=False, soft_wrap=True)
