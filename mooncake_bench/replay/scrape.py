"""What did the server say of itself during the run? Its /metrics, once a second, on our clock."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator

import httpx
import polars as pl

from mooncake_bench.records import SERVER_METRICS

EVERY_S = 1.0
TIMEOUT_S = 5.0
MAX_ROWS = 500_000
"""About 25 MB of Parquet; a server with more changing series than that is cut, and it is said."""
MAX_PAGE_BYTES = 16 << 20
_LINE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?[ \t]+(\S+)(?:[ \t]+-?\d+)?\s*")


class Scraper:
    """Reads `{base}/metrics` in a thread of its own from `start` to `stop`; then `frame`.

    A value is kept when it differs from the one before it, so constant series cost one row.
    Histogram buckets are left out: sums and counts stay. A server without the page gives no rows.
    """

    def __init__(
        self, base: str, headers: dict[str, str], *, every_s: float = EVERY_S, rows: int = MAX_ROWS
    ) -> None:
        self._http = httpx.Client(
            base_url=base,
            timeout=TIMEOUT_S,
            trust_env=False,
            headers=headers,
            verify=base.startswith("https:"),
        )
        self._every_s = every_s
        self._max_rows = rows
        self._rows: list[tuple[float, str, str, float]] = []
        self._last: dict[tuple[str, str], float] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scrape-metrics", daemon=True)
        self.is_cut = False
        """More rows came than are kept."""
        self.missed = 0
        """Scrapes that failed after one that worked."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Look once more, and end the thread."""
        self._is_over.set()
        self._thread.join()
        self._http.close()

    def frame(self, origin: float) -> pl.DataFrame:
        """What was read, columns SERVER_METRICS; times from `origin` (of time.perf_counter)."""
        frame = pl.DataFrame(self._rows, schema=SERVER_METRICS, orient="row")
        # What was read before the start is how the server began: it stands at the start.
        return frame.with_columns((pl.col("time_s") - origin).clip(0.0))

    def _run(self) -> None:
        due = time.perf_counter()
        while self._take() and not self.is_cut:
            due = max(due + self._every_s, time.perf_counter())
            if self._is_over.wait(due - time.perf_counter()):
                self._take()  # The end of the run is worth a look as well.
                return

    def _take(self) -> bool:
        """Read the page once; False where reading on has no sense."""
        before = time.perf_counter()
        try:
            answer = self._http.get("metrics")
        except httpx.HTTPError:
            self.missed += bool(self._last)
            return bool(self._last)
        middle = (before + time.perf_counter()) / 2
        if answer.status_code != 200 or len(answer.content) > MAX_PAGE_BYTES:
            return False
        for name, labels, value in parse_metrics(answer.text):
            if self._last.get((name, labels)) == value:
                continue
            if len(self._rows) >= self._max_rows:
                self.is_cut = True
                break
            self._last[name, labels] = value
            self._rows.append((middle, name, labels, value))
        return True


def parse_metrics(text: str) -> Iterator[tuple[str, str, float]]:
    """(name, labels as written, value) of each sample in Prometheus' text format.

    Left out: comments, buckets of histograms, `_created` stamps, NaN and what is no sample.
    """
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None or match[1].endswith(("_bucket", "_created")):
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        if value == value:
            yield match[1], match[2] or "", value
