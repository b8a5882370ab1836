"""Where a token is asked for: a wrong one is refused, the right one opens everything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from browser_harness import DashboardProcess, choose_theme, screenshot

TOKEN = "correct-horse-battery-staple-0123456789"


def test_a_token_opens_the_page_and_logging_out_closes_it(
    store: Path, tmp_path: Path, serve: Callable[..., DashboardProcess], open_page: Callable[..., Any]
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    secret = tmp_path / "token"
    secret.write_text(TOKEN + "\n")
    secret.chmod(0o600)
    dashboard = serve(store, "--token-file", str(secret))
    open_page.seen.may_refuse = True  # A browser reports every 401 on its console.
    page = open_page(dashboard.url, bypass_csp=True)
    page.get_by_role("heading", name="Log in").wait_for()
    assert page.get_by_label("Token").evaluate("element => element === document.activeElement")
    for theme in ("light", "dark"):
        choose_theme(page, theme)
        screenshot(page, f"login-{theme}")
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()

    page.get_by_label("Token").fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("This is not the token of this dashboard.").wait_for()
    page.get_by_label("Token").fill(TOKEN)
    page.keyboard.press("Enter")
    page.locator("table.runs tbody tr").nth(2).wait_for()
    page.locator(".live-live").wait_for()
    assert page.evaluate("document.cookie") == ""  # Not for scripts.

    page.get_by_role("button", name="Log out").click()
    page.get_by_role("heading", name="Log in").wait_for()
    page.reload()
    page.get_by_role("heading", name="Log in").wait_for()
