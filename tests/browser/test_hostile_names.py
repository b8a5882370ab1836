"""Names, errors and events from outside are text on every page: nothing of them runs or turns words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_store import hostile_run

from turnout.dashboard import Dashboard, DashboardOptions
from turnout.server import RunStore

VIEWS = (
    "?",
    "?page=run&run={run}",
    "?page=run&run={run}&tab=clients",
    "?page=run&run={run}&tab=clients&client=18446744073709551615",
    "?page=run&run={run}&tab=diagnostics",
    "?page=run&run={run}&tab=config",
    "?page=run&run={run}&tab=events",
    "?page=compare&runs={run}",
    "?page=run&run=%3Cscript%3Ealert(1)%3C/script%3E",
    "?page=compare&runs=%3Cimg%20src=x%20onerror=alert(1)%3E",
)


def test_hostile_names_are_inert(tmp_path: Path, open_page: Callable[..., Any]) -> None:
    with RunStore(tmp_path) as store:
        run = hostile_run(store)
    with Dashboard(tmp_path, DashboardOptions(port=0), catalogue=list) as dashboard:
        look_at_every_view(dashboard, open_page, run)


def look_at_every_view(dashboard: Dashboard, open_page: Callable[..., Any], run: str) -> None:
    open_page.seen.may_refuse = True  # The two made-up ids are refused.
    page = open_page(dashboard.url)
    page.on("dialog", lambda dialog: open_page.seen.complaints.append(f"dialog: {dialog.message}"))
    for view in VIEWS:
        page.goto(dashboard.url + view.format(run=run))
        page.get_by_text("<script>").or_(page.get_by_text("<img")).or_(page.locator("td")).or_(
            page.get_by_role("alert")
        ).first.wait_for(state="attached")
        page.wait_for_timeout(300)
        # An attack that worked would have made an element, changed the title, or turned the direction.
        assert page.locator("main script, main img, main iframe").count() == 0
        assert page.title() != "owned"
        assert "\u202e" not in page.locator("main").inner_text()
