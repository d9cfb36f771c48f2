"""Where do the CPU seconds of `mooncake-bench simulate` go? Run by simulators.py, beside the runs
that it compares: `python simulate_stages.py STAGES.json simulate --trace ...`.

The command line itself runs, with a look at the CPU clock where one stage hands over to the next.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Stages:
    """CPU seconds of this process, from its very start, at each boundary that was passed."""

    def __init__(self) -> None:
        self.passed: dict[str, float] = {}

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with the CPU clock read as `NAME begins` and `NAME ends`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.passed[f"{name} begins"] = time.process_time()
            result = function(*args, **kwargs)
            self.passed[f"{name} ends"] = time.process_time()
            return result

        return timed


def main(out: Path, arguments: list[str]) -> None:
    """Run the command line with `arguments`; the boundaries go to `out` as JSON."""
    sys.argv = ["mooncake-bench", *arguments]
    stages = Stages()
    from mooncake_bench import cli, simulation
    from mooncake_bench.replay import prepare

    # Both names are looked up when the verb runs. By setattr: simulation only borrows its own.
    for module, name in ((prepare, "load_trace"), (simulation, "simulate")):
        setattr(module, name, stages.around(name, getattr(module, name)))
    try:
        cli.main()
    finally:
        out.write_text(json.dumps(stages.passed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
