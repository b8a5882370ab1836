"""How fast the dashboard's page is in a real Chromium: first paint, weight, heap, and answers to the reader.

The run has 5,000 rounds and 1,000 clients. "answer" is the time from a key or a turn of the wheel to the heat
map's next frame with the new view, "sharp" to the one that has everything as finely as pixels allow, which
includes what had to be loaded. First paint and weight are of cold loads on loopback.

    python benchmarks/dashboard_page.py                  # makes the store in a temporary folder
    python benchmarks/dashboard_page.py --store DIR --repeats 10
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from playwright.sync_api import sync_playwright

from dashboard_store import Shape, fill
from turnout.dashboard import Dashboard, DashboardOptions

BIG = Shape(rounds=5_000, clients=1_000, participation=0.2, series=50)
RUN = "b1900001"
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
# What the page is waited for, and by what it is recognised.
VIEWS = (
    ("runs", "?", "table.runs tbody tr"),
    ("run", f"?page=run&run={RUN}", ".heat canvas[data-sharp=true]"),
    ("clients", f"?page=run&run={RUN}&tab=clients", ".virtual tbody a"),
    ("compare", f"?page=compare&runs={RUN},a0000000,a0000001,a0000002", "table.compare tbody tr"),
)
INTERACTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("zoom in", {"key": "+"}),
    ("zoom in again", {"key": "+"}),
    ("scroll down", {"wheel": {"deltaY": 240}}),
    ("scroll right", {"wheel": {"deltaX": 240}}),
    ("zoom in to cells", {"key": "+", "times": 4}),
    ("pan at cells", {"wheel": {"deltaX": 400}}),
    ("page down", {"key": "PageDown", "times": 3}),
    ("to the first round", {"key": "Home"}),
    ("zoom out", {"key": "-"}),
    ("show all", {"key": "0"}),
)
# Both run in the page: they measure from the input to the frame, without the way between two processes.
ANSWER = """
async (action) => {
  const canvas = document.querySelector(".heat canvas"), box = canvas.parentElement;
  const began = performance.now();
  const shown = new Promise((done) => {
    new MutationObserver((_, observer) => {
      observer.disconnect();
      done(performance.now() - began);
    }).observe(canvas, { attributes: true, attributeFilter: ["data-view"] });
  });
  const edge = canvas.getBoundingClientRect();
  const place = { clientX: edge.left + edge.width / 2, clientY: edge.top + edge.height / 2 };
  for (let turn = 0; turn < (action.times ?? 1); turn += 1) {
    if (turn > 0) await new Promise((next) => requestAnimationFrame(() => requestAnimationFrame(next)));
    const event = action.key
      ? new KeyboardEvent("keydown", { key: action.key, bubbles: true, cancelable: true })
      : new WheelEvent("wheel", { ...action.wheel, ...place, bubbles: true, cancelable: true });
    (action.key ? box : canvas).dispatchEvent(event);
  }
  return shown;
}
"""
SHARP = """
async () => {
  const began = performance.now();
  const canvas = document.querySelector(".heat canvas");
  while (canvas.dataset.sharp !== "true") await new Promise((next) => setTimeout(next, 5));
  return performance.now() - began;
}
"""
PAINT = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"
BYTES = """() => [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")]
  .reduce((sum, entry) => sum + entry.transferSize, 0)"""


def answer_milliseconds(page: Any, action: dict[str, Any]) -> float:
    """Act on the heat map and return the milliseconds until its next frame with another view."""
    return float(page.evaluate(ANSWER, action))


def sharp_milliseconds(page: Any) -> float:
    """Return the milliseconds until the heat map is as fine as it can be."""
    return float(page.evaluate(SHARP))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, help="where the store is, or is made; kept")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--participation", type=float, default=BIG.participation)
    arguments = parser.parse_args()
    shape = Shape(BIG.rounds, BIG.clients, arguments.participation, BIG.series)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.store or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "turnout.sqlite").exists():
            fill(folder, shape, small_runs=30)
        with (
            Dashboard(folder, DashboardOptions(port=0), catalogue=list) as served,
            sync_playwright() as playwright,
        ):
            executable = shutil.which("chromium")
            if executable is None:
                raise SystemExit("chromium is not installed: apt-get install chromium")
            browser = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
            loads(browser, served.url, arguments.repeats)
            interactions(browser, served.url, arguments.repeats)
            browser.close()


def opened(browser: Any, url: str, mark: str) -> tuple[Any, float]:
    """Open a page in a context of its own and return it with the milliseconds until ``mark`` is there."""
    page = browser.new_context(viewport={"width": 1400, "height": 900}).new_page()
    page.goto(url)
    page.locator(mark).first.wait_for()
    return page, float(page.evaluate("() => performance.now()"))


def loads(browser: Any, url: str, repeats: int) -> None:
    """Print first paint, time to content, bytes and heap of cold loads."""
    heads = f"{'first paint':>12} {'content':>10} {'transferred':>12} {'JS heap':>9}"
    print(f"{'page':<22} {heads}   median of {repeats}")
    for name, address, mark in VIEWS:
        figures = [load(browser, url + address, mark) for _ in range(repeats)]
        paint, content, size, heap = (median(column) for column in zip(*figures, strict=True))
        print(f"{name:<22} {paint:>9.0f} ms {content:>7.0f} ms {size / 1e3:>9.0f} kB {heap / 1e6:>6.1f} MB")


def load(browser: Any, url: str, mark: str) -> tuple[float, float, float, float]:
    """Return first paint and content (ms), bytes transferred and heap used (bytes) of one cold load."""
    page, content = opened(browser, url, mark)
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    heap = session.send("Runtime.getHeapUsage")["usedSize"]
    figures = page.evaluate(PAINT), content, page.evaluate(BYTES), heap
    page.context.close()
    return figures


def interactions(browser: Any, url: str, repeats: int) -> None:
    """Print how fast the heat map answers."""
    print(f"\n{'heat map':<22} {'answer':>12} {'worst':>10} {'sharp':>12} {'worst':>10}")
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name, _ in INTERACTIONS}
    for _ in range(repeats):
        page, _ = opened(browser, f"{url}?page=run&run={RUN}", ".heat canvas[data-sharp=true]")
        for name, action in INTERACTIONS:
            answer = answer_milliseconds(page, action)
            taken[name].append((answer, answer + sharp_milliseconds(page)))
        page.context.close()
    for name, pairs in taken.items():
        answers, sharp = zip(*pairs, strict=True)
        print(f"{name:<22} {figures(answers)} {figures(sharp)}")


def figures(milliseconds: Sequence[float]) -> str:
    """Return median and worst."""
    return f"{median(milliseconds):>9.0f} ms {max(milliseconds):>7.0f} ms"


if __name__ == "__main__":
    main()
