"""A run of 5,000 rounds with 1,000 clients: the heat map answers at once and loads no more than it shows."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_harness import REPOSITORY, screenshot

from turnout.dashboard import Dashboard, DashboardOptions

sys.path.append(str(REPOSITORY / "benchmarks"))

from dashboard_page import INTERACTIONS, VIEWS, answer_milliseconds, sharp_milliseconds
from dashboard_store import Shape, fill

# A person calls 0.3 s at once; the rest is room for a busy machine.
GENEROUS_MILLISECONDS = 1_500


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Dashboard, str, Path]]:
    folder: Path = tmp_path_factory.mktemp("large")
    run = fill(folder, Shape(rounds=5_000, clients=1_000, participation=0.05, series=3), small_runs=3)
    with Dashboard(folder, DashboardOptions(port=0), catalogue=list) as served:
        yield served, run, folder


def test_the_heat_map_of_a_large_run_answers_at_once(
    large: tuple[Dashboard, str, Path], open_page: Callable[..., Any]
) -> None:
    dashboard, run, _ = large
    page = open_page(f"{dashboard.url}?page=run&run={run}")
    heat = page.locator(".heat canvas[data-sharp=true]")
    heat.wait_for()
    screenshot(page, "large")
    assert heat.get_attribute("data-view") == "0:999,1:5000"
    box = heat.bounding_box()
    pixels = box["width"] * box["height"]
    assert int(heat.get_attribute("data-painted")) <= pixels
    most = 0
    for name, action in INTERACTIONS:
        before = heat.get_attribute("data-view")
        took = answer_milliseconds(page, action)
        assert took <= GENEROUS_MILLISECONDS, name
        sharp_milliseconds(page)
        assert heat.get_attribute("data-view") != before, name
        most = max(most, int(heat.get_attribute("data-calls")))
        # At most a screen's worth and its margins, never the five million cells.
        assert int(heat.get_attribute("data-painted")) <= 5 * pixels, name
    # Drawing calls grow with what is legible on a screen, not with the matrix.
    assert most <= 1_000


def test_the_table_of_a_thousand_clients_holds_only_the_rows_in_sight(
    large: tuple[Dashboard, str, Path], open_page: Callable[..., Any]
) -> None:
    dashboard, run, _ = large
    page = open_page(f"{dashboard.url}?page=run&run={run}&tab=clients")
    table = page.locator(".virtual")
    table.get_by_role("link", name="3", exact=True).wait_for()
    assert table.locator("table").get_attribute("aria-rowcount") == "1001"
    assert table.locator("tbody tr").count() < 60
    table.evaluate("element => { element.scrollTop = element.scrollHeight }")
    table.get_by_role("link", name="999", exact=True).wait_for()
    assert table.locator("tbody tr").count() < 60
    table.get_by_role("button", name="Took part").click()
    page.locator("th[aria-sort=descending]", has_text="Took part").wait_for()


def test_the_benchmark_prints_what_it_promises(large: tuple[Dashboard, str, Path], browser: Any) -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks/dashboard_page.py")]
    done = subprocess.run(
        [*command, "--store", str(large[2]), "--repeats", "1"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for name in [*(view[0] for view in VIEWS), *(name for name, _ in INTERACTIONS)]:
        [line] = [line for line in done.stdout.splitlines() if line.startswith(f"{name:<22}")]
        figures = [float(figure) for figure in re.findall(r"([\d.]+) (?:ms|kB|MB)", line)]
        assert len(figures) == 4, line
        assert all(figure > 0 for figure in figures), line
