"""A run that goes on while it is watched, also across the dashboard's death; nobody needs to reload."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_harness import SECONDS, DashboardProcess, ask, simulate

from turnout.dashboard import Dashboard


@pytest.fixture
def start_run() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Start simulations that end with the test at the latest."""
    running: list[subprocess.Popen[str]] = []

    def start_run(store: Path) -> subprocess.Popen[str]:
        running.append(simulate(store, "--set", "run.rounds=5000"))
        return running[-1]

    yield start_run
    for run in running:
        run.terminate()
        run.communicate(timeout=SECONDS)


def rounds_shown(page: Any) -> int:
    text = page.locator(".tile", has_text="Round").locator("dd").first.inner_text()
    return int(text.split("/")[0].strip().replace(",", ""))


def at_least(page: Any, rounds: int) -> int:
    """Wait until the page shows so many rounds, and return how many it shows."""
    for _ in range(10 * SECONDS):
        if rounds_shown(page) >= rounds:
            return rounds_shown(page)
        page.wait_for_timeout(100)
    raise AssertionError(f"the page stays at {rounds_shown(page)} rounds")


def test_a_run_is_watched_from_its_first_round_to_its_end(
    tmp_path: Path,
    serve: Callable[..., DashboardProcess],
    open_page: Callable[..., Any],
    start_run: Callable[..., Any],
) -> None:
    from turnout.server import RunStore

    RunStore(tmp_path).close()
    dashboard = serve(tmp_path)
    page = open_page(dashboard.url)
    page.get_by_text("No run yet").wait_for()
    page.locator("code", has_text="turnout simulate").wait_for()
    loads = []
    page.on("load", lambda _: loads.append(page.url))

    run = start_run(tmp_path)
    row = page.locator("table.runs tbody tr")
    row.locator(".status-running").wait_for()
    row.get_by_role("link").click()
    seen = at_least(page, 3)
    heat = page.locator(".heat canvas[data-frames]")
    heat.wait_for()

    # What the reader chose survives the updates.
    page.get_by_role("button", name="log").first.click()
    page.get_by_label("Clients by").select_option("last-round")
    address = page.url
    assert at_least(page, seen + 5) > seen
    assert page.url == address
    assert page.get_by_role("button", name="log").first.get_attribute("aria-pressed") == "true"

    # In the order by id only the columns of the new rounds are painted.
    page.get_by_label("Clients by").select_option("client")
    page.locator(".heat canvas[data-steps='1x1']").wait_for()
    before = int(heat.get_attribute("data-painted"))
    now = at_least(page, rounds_shown(page) + 5)
    page.wait_for_timeout(500)
    grown = int(heat.get_attribute("data-painted")) - before
    assert grown % 60 == 0
    assert 0 < grown <= 60 * (rounds_shown(page) - now + 60)

    run.send_signal(subprocess.signal.SIGINT)
    run.communicate(timeout=SECONDS)
    page.locator(".title .status-interrupted").wait_for()
    [known] = ask(dashboard, "runs")["items"]
    assert at_least(page, known["rounds_done"]) == known["rounds_done"]
    assert loads == []


def test_after_the_dashboards_death_the_page_catches_up(
    tmp_path: Path,
    serve: Callable[..., DashboardProcess],
    open_page: Callable[..., Any],
    start_run: Callable[..., Any],
) -> None:
    from turnout.server import RunStore

    RunStore(tmp_path).close()
    dashboard = serve(tmp_path)
    start_run(tmp_path)
    page = open_page(dashboard.url)
    page.locator("table.runs tbody tr .status-running").wait_for()
    page.locator("table.runs tbody a").click()
    page.get_by_role("link", name="Rounds").click()
    page.locator("main").get_by_text("Clients of a round, by outcome").wait_for()
    seen = at_least(page, 5)

    open_page.seen.may_lose_server = True
    dashboard.kill()
    banner = page.get_by_role("alert").filter(has_text="Reconnecting")
    banner.wait_for()
    page.locator(".live-reconnecting").wait_for()
    page.wait_for_timeout(1_500)
    dashboard.start()
    page.locator(".live-live").wait_for()
    banner.wait_for(state="detached")
    shown = at_least(page, seen + 10)

    chart = page.locator("section", has=page.get_by_role("heading", name="Clients of a round")).locator(
        ".chart"
    )
    chart.locator("summary", has_text="Numbers").click()
    # After a long absence the rounds come in several messages; the headline is ahead of them for a moment.
    for _ in range(10 * SECONDS):
        numbers = [int(text.replace(",", "")) for text in chart.locator("tbody th").all_inner_texts()]
        if numbers[-1] >= shown:
            break
        page.wait_for_timeout(100)
    assert numbers[-1] >= shown
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    assert numbers[0] == max(1, numbers[-1] - 499)


def test_without_a_stream_the_page_asks_again_and_again(
    dashboard: Dashboard, open_page: Callable[..., Any]
) -> None:
    page = open_page(dashboard.url)
    page.route("**/api/v1/stream**", lambda _: None)  # As a proxy that holds everything back.
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    page.locator(".live-polling").wait_for()
    before = sum("/runs?" in url for url in asked)
    page.wait_for_timeout(4_000)
    assert sum("/runs?" in url for url in asked) > before
    page.unroute_all(behavior="ignoreErrors")


def test_a_tab_that_is_hidden_for_a_minute_closes_its_stream(
    dashboard: Dashboard, open_page: Callable[..., Any]
) -> None:
    page = open_page(dashboard.url)
    page.clock.install()
    page.reload()
    page.locator(".live-live").wait_for()
    hide = "hidden => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true }); "
    hide += "document.dispatchEvent(new Event('visibilitychange')) }"
    page.evaluate(hide, True)
    page.clock.fast_forward(50_000)
    assert page.locator(".live-live").count() == 1
    page.clock.fast_forward(11_000)
    page.locator(".live-paused").wait_for()
    page.evaluate(hide, False)
    page.locator(".live-live").wait_for()
