"""Which runs are there to look at, and what was already computed of them?"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from mooncake_bench import metrics
from mooncake_bench.opened import COMPLETE, Glance, Opened, glance, is_run, open_run
from mooncake_bench.records import RecordsError

Answer = TypeVar("Answer")
REMEMBERED = 256
AT_FIRST = 4
"""So many runs are chosen where the address chooses none."""
OPEN_AT_ONCE = 8
"""So many runs are kept in memory, those that were looked at last."""
DEPTH = 3


@dataclass(frozen=True, slots=True)
class Shown:
    """A run under the key that it has in addresses."""

    key: str
    run: Opened
    frame: pl.DataFrame
    """Its requests that count, times from the measured window's start."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A directory that cannot be shown, and why, in one line."""

    key: str
    problem: str


class Store:
    """The runs and plans below some directories. Runs are read when somebody looks at them."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = list(roots)
        self._runs: OrderedDict[str, Shown] = OrderedDict()
        self._answers: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        # One reading at a time: two threads would hold the same run twice.
        self._lock = threading.RLock()

    def runs(self) -> dict[str, Path]:
        """Every run directory by its key."""
        return self._found(is_run)

    def plans(self) -> dict[str, Path]:
        """Every plan directory by its key."""
        return self._found(lambda path: (path / "plan.json").is_file())

    def at_first(self) -> list[str]:
        """The keys of the runs that are looked at where none are chosen."""
        return list(self.runs())[:AT_FIRST]

    def read_ahead(self) -> None:
        """Read those runs now, in a thread: a large one takes as long as a browser to start."""
        keys = self.at_first()
        read = threading.Thread(
            target=lambda: [self.open(key) for key in keys], name="first-runs", daemon=True
        )
        read.start()

    def open(self, key: str) -> Shown | Broken:
        """The run of that key as it is now."""
        directory = self.runs().get(key)
        if directory is None:
            return Broken(key, f"{key}: there is no such run; choose another")
        with self._lock:
            before = self._runs.get(key)
            try:
                run = open_run(directory, before.run if before is not None else None)
            except RecordsError as error:
                return Broken(key, str(error))
            if before is not None and run is before.run:
                self._runs.move_to_end(key)
                return before
            shown = Shown(key, run, metrics.windowed(run.frame, run.info.measured_s))
            self._runs[key] = shown
            while len(self._runs) > OPEN_AT_ONCE:
                self._runs.popitem(last=False)
            return shown

    def glance(self, key: str) -> Glance | Broken:
        """What the table of all runs says of one."""
        directory = self.runs()[key]
        with self._lock:
            known = self._runs.get(key)
        try:
            if known is not None and known.run.state != COMPLETE:
                opened = self.open(key)
                if isinstance(opened, Shown):
                    return Glance(opened.run.info, opened.run.summary, opened.run.state)
            return glance(directory)
        except RecordsError as error:
            return Broken(key, str(error))

    def ask(self, shown: Shown, question: Callable[..., Answer], *rest: Any) -> Answer:
        """`question(frame, *rest)`, remembered as long as the run is the same."""
        return self.remember(
            (shown.key, shown.run.version, question.__name__, *rest),
            lambda: question(shown.frame, *rest),
        )

    def remember(self, name: tuple[Any, ...], compute: Callable[[], Answer]) -> Answer:
        """The answer of that name; computed if it is not among the last REMEMBERED."""
        with self._lock:
            if name in self._answers:
                self._answers.move_to_end(name)
                found: Answer = self._answers[name]
                return found
        answer = compute()
        with self._lock:
            self._answers[name] = answer
            while len(self._answers) > REMEMBERED:
                self._answers.popitem(last=False)
        return answer

    def _found(self, wanted: Callable[[Path], bool]) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for root in self.roots:
            for path in _below(root, wanted, DEPTH):
                inside = path.relative_to(root) if path != root else Path(root.resolve().name)
                key = _plain(str(inside))
                while key in found:
                    key += "+"
                found[key] = path
        return found


def _below(directory: Path, wanted: Callable[[Path], bool], depth: int) -> Iterator[Path]:
    if wanted(directory):
        yield directory
        return
    if depth == 0 or not directory.is_dir():
        return
    for child in sorted(directory.iterdir()):
        if child.is_dir() and not child.is_symlink() and child.name != "segments":
            yield from _below(child, wanted, depth - 1)


def _plain(key: str) -> str:
    """Without what has a meaning in the address."""
    return "".join(c if c.isalnum() or c in "-_./+" else "_" for c in key)
