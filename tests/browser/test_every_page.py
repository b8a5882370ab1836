"""Every page in light and in dark: it shows its content, axe finds nothing, the console stays quiet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from browser_harness import choose_theme, runs_by_strategy, screenshot

from turnout.dashboard import Dashboard

# Name, address (with the runs' ids), and a text that only the loaded page has.
PAGES = (
    ("runs", "?", "fedamd"),
    ("run", "?page=run&run={fedamd}", "accuracy, held out"),
    ("rounds", "?page=run&run={fedamd}&tab=rounds", "Seconds of a round, by phase"),
    ("clients", "?page=run&run={fedamd}&tab=clients", "Worst tenth"),
    ("client", "?page=run&run={fedamd}&tab=clients&client=3", "Rounds it was asked for"),
    ("diagnostics", "?page=run&run={fedamd}&tab=diagnostics", "Memory-bytes"),
    ("config", "?page=run&run={fedamd}&tab=config", "strategy.name"),
    ("diff", "?page=run&run={fedamd}&tab=config&against={fedau}", "Differences"),
    ("events", "?page=run&run={fedamd}&tab=events", "finished after"),
    ("compare", "?page=compare&runs={fedavg},{fedau},{fedamd}&target=0.2", "Settings that differ"),
    ("methods", "?page=methods", "FedAvg"),
    ("nowhere", "?page=nowhere", "No such page"),
    ("no-run", "?page=run&run=none0000", "is not in the store"),
)


@pytest.mark.parametrize(("name", "address", "text"), PAGES, ids=[page[0] for page in PAGES])
def test_a_page_shows_its_content_and_is_accessible(
    dashboard: Dashboard, open_page: Callable[..., Any], name: str, address: str, text: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    open_page.seen.may_refuse = name == "no-run"
    url = dashboard.url + address.format(**runs_by_strategy(dashboard))
    # Axe brings a script of its own, which the page's policy refuses.
    page = open_page(url, bypass_csp=True)
    page.get_by_text(text).locator("visible=true").first.wait_for()
    for theme in ("light", "dark"):
        choose_theme(page, theme)
        for canvas in page.locator(".heat canvas").all():
            canvas.and_(page.locator("[data-frames]")).wait_for()
        screenshot(page, f"{name}-{theme}")
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()


def test_the_theme_can_be_chosen_and_is_remembered(
    dashboard: Dashboard, open_page: Callable[..., Any]
) -> None:
    page = open_page(dashboard.url, theme="light")
    root = page.locator("html")
    page.keyboard.press("t")
    assert root.get_attribute("data-theme") == "dark"
    page.reload()
    page.get_by_role("button", name="Theme: dark").wait_for()
    assert root.get_attribute("data-theme") == "dark"
    page.keyboard.press("t")
    page.keyboard.press("t")
    assert root.get_attribute("data-theme") == "light"
    choose_theme(page, "dark")


def test_the_list_of_shortcuts_opens_and_closes(dashboard: Dashboard, open_page: Callable[..., Any]) -> None:
    page = open_page(dashboard.url)
    page.keyboard.press("?")
    page.get_by_role("dialog", name="Keyboard shortcuts").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
