"""Where are baselines kept? In a directory of runs, or in a branch of git: git:BRANCH[:PATH]."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mooncake_bench.gate.errors import GateError
from mooncake_bench.gate.evidence import Evidence, read_evidence
from mooncake_bench.gate.golden import is_golden

GIT = "git:"
RUN_FILES = ("run.json", "summary.json", "requests.parquet", "spans.parquet", "samples.parquet")


def read_side(places: Sequence[str]) -> list[Evidence]:
    """Every run at the places: run directories, directories of them, branches of git."""
    found: list[Evidence] = []
    for place in places:
        with opened(place) as directory:
            found += [read_evidence(path) for path in run_directories(directory, place)]
    return found


def run_directories(directory: Path, place: str) -> list[Path]:
    """The directory itself if it is a run, else the runs right below it. Raises GateError."""
    if (directory / "run.json").exists():
        return [directory]
    if not directory.exists():
        raise GateError(f"{place}: no such directory; make a run, or `gate record` a baseline")
    below = sorted(path.parent for path in directory.glob("*/run.json"))
    if not below:
        if is_golden(directory):
            raise GateError(f"{place}: a baseline of scenarios; add --scenarios FILE")
        raise GateError(f"{place}: no run there; name a run directory, or one that holds some")
    return below


@contextmanager
def opened(place: str) -> Iterator[Path]:
    """The place as a directory to read; of a branch, a copy that goes away."""
    if not place.startswith(GIT):
        yield Path(place)
        return
    branch, path = branch_and_path(place)
    packed = git("archive", "--format=tar", f"{branch}:{path}" if path else branch)
    with tempfile.TemporaryDirectory() as directory:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(directory, filter="data")
        yield Path(directory)


@contextmanager
def written(place: str, message: str) -> Iterator[Path]:
    """A directory to write in; of a branch, its content is committed there at the end.

    The working tree and the index are left alone; pushing is the caller's.
    """
    if not place.startswith(GIT):
        yield Path(place)
        return
    branch, path = branch_and_path(place)
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)
        _commit(Path(directory), branch, path, message)


def keep_runs(runs: Sequence[Path], directory: Path) -> None:
    """Copy runs into the directory as 1, 2, ...; those that were there go. Raises GateError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob("*/run.json"):
            shutil.rmtree(old.parent)
        for number, run in enumerate(runs, 1):
            target = directory / f"{number:03}"
            target.mkdir()
            for name in RUN_FILES:
                shutil.copyfile(run / name, target / name)
    except OSError as error:
        raise GateError(f"{directory}: cannot keep the runs ({error.strerror})") from None


def branch_and_path(place: str) -> tuple[str, str]:
    branch, _, path = place.removeprefix(GIT).partition(":")
    if not branch:
        raise GateError(f"{place}: no branch; write it like git:perf-baselines:main")
    return branch, path.strip("/")


def _commit(directory: Path, branch: str, path: str, message: str) -> None:
    """Put the files below `path` of the branch, in place of what was there."""
    with tempfile.TemporaryDirectory() as scratch:
        own = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
        reference = f"refs/heads/{branch}"
        parent = git("rev-parse", "--verify", "--quiet", reference, may_fail=True).decode().strip()
        if parent:
            git("read-tree", parent, env=own)
            git("rm", "-r", "--cached", "--quiet", "--ignore-unmatch", "--", path or ".", env=own)
        for file in sorted(one for one in directory.rglob("*") if one.is_file()):
            blob = git("hash-object", "-w", "--", str(file.absolute())).decode().strip()
            name = "/".join(filter(None, (path, file.relative_to(directory).as_posix())))
            git("update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", env=own)
        tree = git("write-tree", env=own).decode().strip()
        parents = ["-p", parent] if parent else []
        commit = git("commit-tree", tree, *parents, "-m", message, env=_identity()).decode().strip()
        git("update-ref", reference, commit, parent or "0" * 40)


def _identity() -> dict[str, str]:
    """A CI machine often has no name to commit with."""
    if git("config", "user.email", may_fail=True).strip():
        return {}
    roles = ("AUTHOR", "COMMITTER")
    names = {f"GIT_{role}_NAME": "mooncake-bench" for role in roles}
    return names | {f"GIT_{role}_EMAIL": "mooncake-bench@localhost" for role in roles}


def git(*arguments: str, env: dict[str, str] | None = None, may_fail: bool = False) -> bytes:
    """What git says; raises GateError with its first line."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, env={**os.environ, **(env or {})}, check=False
        )
    except OSError as error:
        raise GateError(f"git: {error.strerror}; install git, or use a directory") from None
    if done.returncode and not may_fail:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["failed"]
        raise GateError(f"git {arguments[0]}: {said[0]}; give git:BRANCH[:PATH] of this repository")
    return done.stdout
