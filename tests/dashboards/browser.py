"""How do the tests look at a page? As somebody at a browser, with an eye on what goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from mooncake_bench import metrics
from mooncake_bench.records import read_run
from mooncake_bench.slo import Slo

PAGES = ("overview", "slo", "latency", "request", "cluster", "cache", "rejections", "plan")
# Texts of one figure that lie upon each other, or stick out of it: pairs of them.
CLASHES = """() => {
  const found = [];
  for (const plot of document.querySelectorAll('.js-plotly-plot')) {
    const frame = plot.querySelector('svg.main-svg').getBoundingClientRect();
    const texts = Array.from(plot.querySelectorAll('svg text'))
      .filter(text => text.textContent.trim() && !text.closest('.hoverlayer'))
      .map(text => ({says: text.textContent, box: text.getBoundingClientRect()}))
      .filter(one => one.box.width > 0);
    const name = plot.closest('[data-figure]')?.dataset.figure || '?';
    for (const [at, {says, box}] of texts.entries()) {
      if (box.left < frame.left - 2 || box.right > frame.right + 2)
        found.push(`${name}: "${says}" sticks out`);
      for (const other of texts.slice(at + 1)) {
        const wide = Math.min(box.right, other.box.right) - Math.max(box.left, other.box.left);
        const high = Math.min(box.bottom, other.box.bottom) - Math.max(box.top, other.box.top);
        if (wide > -2 && high > 4) found.push(`${name}: "${says}" on "${other.says}"`);
      }
    }
  }
  return found;
}"""


class Watched:
    """A page that remembers what went wrong and what it asked for."""

    def __init__(self, chromium: Any, url: str, width: int = 1280, scheme: str = "light") -> None:
        self.url = url
        self.page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.errors: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._asked)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.errors.append(f"asked for {request.url}")

    def open(self, path: str) -> Any:
        self.page.goto(self.url + path)
        self.page.wait_for_selector("#page > *")
        self.page.wait_for_selector("#controls .control")
        return self.page

    def shows(self, cell: str, value: float) -> None:
        """Wait until the page says so: a crowded machine takes its time."""
        self.page.wait_for_function(
            '([cell, value]) => Math.abs(document.querySelector(`[data-cell="${cell}"]`)'
            "?.dataset.value - value) < 1e-12",
            arg=[cell, value],
        )

    def drawn(self) -> None:
        """Wait until every figure of the page has its drawing."""
        self.page.wait_for_function(
            "document.querySelectorAll('[data-figure]').length == "
            "document.querySelectorAll('.js-plotly-plot .main-svg:first-child').length"
        )

    def number(self, cell: str) -> float:
        found = self.page.wait_for_selector(f'[data-cell="{cell}"]')
        return float(found.get_attribute("data-value"))

    def clashes(self) -> list[str]:
        """Texts of figures that cannot be read for others, or that are cut off."""
        found: list[str] = self.page.evaluate(CLASHES)
        return found

    def control(self, name: str, label: str) -> None:
        """Choose one of a control's options."""
        self.page.locator(f"[aria-labelledby=label-{name}]").get_by_text(label, exact=True).click()

    def click(self, figure: str, trace: int = 0, pick: str = "0") -> Any:
        """Click a point of a figure, the one at the index that `pick` computes from `t`, its trace;
        returns what the point stands for."""
        plot = self.page.locator(f'[data-figure="{figure}"] .js-plotly-plot')
        plot.locator(".nsewdrag").first.wait_for()
        plot.scroll_into_view_if_needed()
        point = plot.evaluate(
            """(plot, [trace, pick]) => {
              const t = plot._fullData[trace], f = plot._fullLayout;
              const i = Function('t', 'return ' + pick)(t);
              const box = plot.querySelector('.nsewdrag').getBoundingClientRect();
              return {x: box.x + f.xaxis.d2p(t.x[i]), y: box.y + f.yaxis.d2p(t.y[i]),
                      means: t.customdata[i]};
            }""",
            [trace, pick],
        )
        self.page.mouse.move(point["x"] - 3, point["y"])
        self.page.mouse.move(point["x"], point["y"])
        self.page.wait_for_timeout(200)
        self.page.mouse.click(point["x"], point["y"])
        return point["means"]


def expected(directory: Path, slo: Slo, statistic: str = "tbt_s") -> float:
    run = read_run(directory)
    frame = metrics.per_request(run.requests, run.spans)
    frame = frame.with_columns(pl.col(statistic).alias("tbt_s"))
    return float(metrics.attained(frame, slo).sum()) / frame.height
