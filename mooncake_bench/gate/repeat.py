"""How are more runs made? Both sides in turn, so that what drifts meets them alike: A B B A."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from mooncake_bench.gate.errors import GateError
from mooncake_bench.gate.evidence import Evidence, read_evidence
from mooncake_bench.gate.policy import Runs
from mooncake_bench.gate.repeated import Batch
from mooncake_bench.replay.options import flags

NOT_AGAIN = ("out", "name", "url", "salt", "search", "search_from", "search_to")
TRIES = 3
INVALID_RUN = 3  # Exit code of a replay that wrote an invalid run: judged as one.


class Repeater:
    """Makes runs by the commands of the policy, or by replaying what earlier runs say."""

    def __init__(
        self, runs: Runs, given: Batch | None, directory: Path, on_run: Callable[[str], None]
    ) -> None:
        self.timeout_s = runs.timeout_s
        self.directory = directory
        self.on_run = on_run
        self.commands = {"baseline": runs.baseline, "candidate": runs.candidate}
        if runs.rerun == "replay" and given is not None:
            self.commands = {
                "baseline": replay_command(given.baseline[0]),
                "candidate": replay_command(given.candidate[0]),
            }

    @property
    def can_repeat(self) -> bool:
        return all(self.commands.values())

    def batch(self, name: str, repeats: int) -> Batch:
        """So many runs of each side in DIRECTORY/name-SIDE-NUMBER; raises GateError."""
        made: dict[str, list[Evidence]] = {"baseline": [], "candidate": []}
        for number in range(1, repeats + 1):
            sides = ["baseline", "candidate"]
            for side in sides if number % 2 else reversed(sides):
                out = self.directory / f"{name}-{side}-{number}"
                made[side].append(self.valid_run(side, out, number))
        return Batch(made["baseline"], made["candidate"])

    def valid_run(self, side: str, out: Path, number: int) -> Evidence:
        """A run, made anew if it is invalid: a machine that was busy for a moment says nothing."""
        for _ in range(TRIES):
            made = self.run(side, out, number)
            if made.info is None or made.info.valid:
                break
        return made

    def run(self, side: str, out: Path, number: int) -> Evidence:
        """One run of one side; what the command says goes to a log beside the run."""
        self.on_run(f"{side} {number}")
        command = fill(self.commands[side], side, out, number)
        out.parent.mkdir(parents=True, exist_ok=True)
        log = out.with_suffix(".log")
        try:
            with log.open("wb") as file:
                done = subprocess.run(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=self.timeout_s,
                    check=False,
                )
        except OSError as error:
            raise GateError(
                f"[runs] {side}: {command[0]}: {error.strerror}; mend the command"
            ) from None
        except subprocess.TimeoutExpired:
            raise GateError(
                f"[runs] {side}: no end within {self.timeout_s:g} s; raise timeout_s"
            ) from None
        if done.returncode not in (0, INVALID_RUN):
            raise GateError(f"[runs] {side}: exit code {done.returncode}; see {log}")
        return read_evidence(out)


def fill(template: str, side: str, out: Path, number: int) -> list[str]:
    """The command's words with {out} and {number} put in; no shell is involved."""
    if "{out}" not in template:
        raise GateError(f'[runs] {side} = "{template}": say where the run goes with {{out}}')
    try:
        words = shlex.split(template)
        return [word.format(out=out, number=number) for word in words]
    except (ValueError, KeyError, IndexError) as error:
        raise GateError(
            f'[runs] {side} = "{template}": {error}; only {{out}} and {{number}} are known'
        ) from None


def replay_command(given: Evidence) -> str:
    """A command that replays what a run's run.json says, at the same endpoint."""
    options = given.info.config.get("replay") if given.info is not None else None
    if not options or not options.get("url"):
        raise GateError(f"{given.name}: no replay to run again; give [runs] commands, no rerun")
    words = [sys.executable, "-m", "mooncake_bench.cli", "replay", "--out", "{out}"]
    words += ["--url", str(options["url"])]
    for flag in flags():
        value = options.get(flag.field, flag.default)
        if flag.field in NOT_AGAIN or value == flag.default:
            continue
        if flag.kind is bool:
            words.append(flag.name if value else f"--no-{flag.name[2:]}")
        else:
            words += [flag.name, str(value)]
    return shlex.join(words).replace("'{out}'", "{out}")
