"""What a reader does: search, compare, zoom, download, share the address, all of it by keyboard too."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from browser_harness import ask, runs_by_strategy

from turnout.dashboard import Dashboard


def rows_of(page: Any) -> Any:
    return page.locator("table.runs tbody tr")


def test_runs_are_searched_filtered_and_sorted(dashboard: Dashboard, open_page: Callable[..., Any]) -> None:
    page = open_page(dashboard.url)
    rows = rows_of(page)
    rows.nth(2).wait_for()
    page.keyboard.press("/")
    page.keyboard.type("fedau")
    rows.nth(1).wait_for(state="detached")
    assert "fedau" in rows.first.inner_text()
    assert page.url.endswith("?q=fedau")
    page.get_by_role("searchbox").fill("no such run")
    page.get_by_role("link", name="Show all runs.").click()
    rows.nth(2).wait_for()
    page.get_by_label("strategy").select_option("fedavg")
    rows.nth(1).wait_for(state="detached")
    page.get_by_label("strategy").select_option("")
    page.get_by_role("button", name="Strategy").click()
    page.locator("th[aria-sort=ascending]", has_text="Strategy").wait_for()
    rows.nth(2).filter(has_text="fedavg").wait_for()
    assert [rows.nth(at).locator("td").nth(3).inner_text() for at in range(3)] == [
        "fedamd",
        "fedau",
        "fedavg",
    ]


def test_chosen_runs_are_compared(dashboard: Dashboard, open_page: Callable[..., Any]) -> None:
    page = open_page(dashboard.url)
    for strategy in ("fedavg", "fedamd"):
        rows_of(page).filter(has_text=strategy).get_by_role("checkbox").check()
    page.get_by_role("link", name="Compare", exact=True).last.click()
    table = page.locator("table.compare")
    table.wait_for()
    ids = runs_by_strategy(dashboard)
    url = f"compare?run={ids['fedavg']}&run={ids['fedamd']}&metric=evaluate/accuracy&target=0.2"
    expected = {row["run"]["strategy"]: row for row in ask(dashboard, url)["table"]}
    assert expected["fedavg"]["best"] != expected["fedamd"]["best"]
    best = max(expected, key=lambda strategy: expected[strategy]["best"])
    page.get_by_label("Target").fill("0.2")
    page.get_by_label("Target").press("Tab")
    table.get_by_text("Rounds to target").wait_for()
    for strategy, row in expected.items():
        line = table.locator("tbody tr").filter(has_text=strategy)
        cell = line.locator("td").nth(1)
        assert f"{100 * row['best']:.1f} % (round {row['best_round']})" in cell.inner_text()
        assert ("best" in cell.get_attribute("class").split()) == (strategy == best)
        reached = row["rounds_to_target"]
        assert (
            line.locator("td")
            .nth(3)
            .inner_text()
            .endswith("not reached" if reached is None else str(reached))
        )
    page.get_by_role("button", name="bytes").click()
    page.get_by_text("None of these runs counted bytes").wait_for()
    page.get_by_role("button", name="Remove run").first.click()
    table.locator("tbody tr").nth(1).wait_for(state="detached")


def test_a_shared_address_shows_the_same_view(dashboard: Dashboard, open_page: Callable[..., Any]) -> None:
    run = runs_by_strategy(dashboard)["fedamd"]
    page = open_page(f"{dashboard.url}?page=run&run={run}")
    heat = page.locator(".heat canvas[data-frames]")
    heat.wait_for()
    page.get_by_role("button", name="Zoom in").click()
    page.get_by_role("button", name="log").first.click()
    page.get_by_role("button", name="seconds").first.click()
    page.get_by_label("Clients by").select_option("participation")
    page.get_by_role("button", name="Zoom in").click()
    page.get_by_role("button", name="Show all").and_(page.locator(":enabled")).wait_for()
    plot = page.locator(".plot").first
    plot.hover()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 80)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 80, steps=4)
    page.mouse.up()
    page.locator(".chart-tools").first.get_by_role("button", name="Show all").wait_for()
    shared, note, window = page.url, page.locator(".axis").inner_text(), heat.get_attribute("data-view")
    for part in ("log=1", "x=seconds", "rows-by=participation", "rows=", "rounds=", "zoom="):
        assert part in shared

    other = open_page(shared)
    other.locator(f".heat canvas[data-view='{window}']").wait_for()
    assert other.locator(".axis").inner_text() == note
    assert other.get_by_role("button", name="log").first.get_attribute("aria-pressed") == "true"
    assert other.get_by_label("Clients by").input_value() == "participation"
    other.locator(".chart-tools").first.get_by_role("button", name="Show all").wait_for()
    assert other.url == shared


def test_tables_and_pictures_are_downloaded(
    dashboard: Dashboard, open_page: Callable[..., Any], tmp_path: Path
) -> None:
    run = runs_by_strategy(dashboard)["fedavg"]
    page = open_page(f"{dashboard.url}?page=run&run={run}")
    page.locator("summary", has_text="Export").click()
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Rounds, CSV").click()
    waiting.value.save_as(tmp_path / "rounds.csv")
    lines = list(csv.DictReader((tmp_path / "rounds.csv").open(encoding="utf-8")))
    assert [int(line["round"]) for line in lines] == list(range(1, 21))
    with page.expect_download() as waiting:
        page.locator(".chart").first.get_by_role("button", name="PNG").click()
    waiting.value.save_as(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_a_chart_gives_its_numbers_as_a_table(dashboard: Dashboard, open_page: Callable[..., Any]) -> None:
    run = runs_by_strategy(dashboard)["fedavg"]
    page = open_page(f"{dashboard.url}?page=run&run={run}")
    chart = page.locator("section", has=page.get_by_role("heading", name="Accuracy")).locator(".chart")
    chart.locator("summary", has_text="Numbers").click()
    cells = chart.locator("tbody tr").all_inner_texts()
    series = ask(dashboard, f"runs/{run}/series?name=evaluate/accuracy")["series"][0]
    shown = {int(row.split()[0]): row.split()[1] for row in cells if "%" in row}
    assert shown == {
        at: f"{100 * value:.1f}" for at, value in zip(series["rounds"], series["values"], strict=True)
    }


def test_by_keyboard_from_the_runs_to_a_client(dashboard: Dashboard, open_page: Callable[..., Any]) -> None:
    page = open_page(dashboard.url)
    rows_of(page).first.wait_for()
    page.keyboard.press("Tab")
    assert page.locator(":focus").inner_text() == "Skip to content"
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("x")
    page.get_by_text("1 run selected").wait_for()
    page.keyboard.press("Enter")
    page.locator(".heat canvas[data-frames]").wait_for()
    assert page.locator("h1:focus").count() == 1
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.locator(".heat-box:focus").count():
            break
    heat = page.locator(".heat-box:focus")
    outline = heat.evaluate("element => getComputedStyle(element).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Home")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    tip = page.locator(".tip")
    tip.get_by_text(re.compile(r"client \d+")).wait_for()
    client = re.search(r"client (\d+)", tip.inner_text())[1]
    assert client == "3"
    page.keyboard.press("+")
    page.locator(".axis", has_text="rounds 2–11").wait_for()
    page.keyboard.press("Enter")
    page.get_by_role("heading", name=f"Client {client}").wait_for()
    page.go_back()
    page.locator(".heat canvas[data-frames]").wait_for()


def test_a_cell_tells_what_the_store_has(dashboard: Dashboard, open_page: Callable[..., Any]) -> None:
    run = runs_by_strategy(dashboard)["fedamd"]
    known = next(
        item
        for client in range(60)
        for item in ask(dashboard, f"runs/{run}/clients/{client}/rounds?limit=1")["items"]
        if item["outcome"] == "ok" and item["weight"]
    )
    # One row and eight rounds around it are as close as one can look.
    row, first = int(known["client"]) + 1, max(1, known["round"] - 3)
    view = f"rows={row}:{row + 1}&rounds={first}:{first + 1}"
    page = open_page(f"{dashboard.url}?page=run&run={run}&{view}")
    heat = page.locator(".heat canvas[data-frames]")
    heat.wait_for()
    heat.scroll_into_view_if_needed()
    top, bottom, begin, end = (int(part) for part in re.split("[:,]", heat.get_attribute("data-view")))
    box = heat.bounding_box()
    width, height = box["width"] - 64 - 14, box["height"] - 22
    column = (known["round"] - begin + 0.5) / (end - begin + 1)
    line = (int(known["client"]) - top + 0.5) / (bottom - top + 1)
    page.mouse.move(box["x"] + 64 + column * width, box["y"] + line * height)
    tip = page.locator(".tip")
    tip.get_by_text("stale").wait_for()
    text = tip.inner_text()
    assert f"client {known['client']} · round {known['round']}" in text
    assert "took part" in text
    assert f"{known['staleness']} round" in text
