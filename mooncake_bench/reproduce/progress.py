"""How far is it? A bar on a terminal, and a line for every run with its CPU seconds."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


@dataclass(frozen=True, slots=True)
class Progress:
    """A run has ended; `is_new` is False for one kept from before."""

    done: int
    total: int
    name: str
    cpu_s: float
    is_new: bool


class RunsBar:
    """Shows progress on a console; `advance` is to be called for each run."""

    def __init__(self, console: Console) -> None:
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.task = self.bar.add_task("runs", total=None)

    def advance(self, progress: Progress) -> None:
        self.bar.update(self.task, completed=progress.done, total=progress.total)
        if progress.is_new:
            line = f"{progress.cpu_s:7.2f} CPU s  {progress.name}"
            self.bar.console.print(line, highlight=False, soft_wrap=True)

    def __enter__(self) -> RunsBar:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()
