"""A real Chromium on a real `turnout dashboard` over a store that `turnout simulate` wrote."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from browser_harness import (
    BUILT,
    FLAGS,
    SECONDS,
    DashboardProcess,
    simulate,
    unavailable,
)

from turnout.cli.dashboard import method_catalogue
from turnout.dashboard import Dashboard, DashboardOptions


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        unavailable("chromium is not installed: apt-get install chromium")
    if not BUILT.is_file():
        unavailable("the dashboard's page is not built: make page")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("playwright is not installed: pip install -e '.[dev]'")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short runs of different strategies on real data."""
    folder = tmp_path_factory.mktemp("runs")
    run = simulate(folder, "--set", "run.rounds=20", "--compare", "fedavg,fedau,fedamd")
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    return folder


@pytest.fixture
def serve() -> Iterator[Callable[..., DashboardProcess]]:
    """Start dashboards as processes that end with the test."""
    running: list[DashboardProcess] = []

    def serve(store: Path, *words: str) -> DashboardProcess:
        running.append(DashboardProcess(store, *words))
        return running[-1]

    yield serve
    for dashboard in running:
        dashboard.kill()


@pytest.fixture(scope="session")
def dashboard(store: Path) -> Iterator[Dashboard]:
    """One dashboard for all tests that only look."""
    with Dashboard(store, DashboardOptions(port=0), catalogue=method_catalogue) as running:
        yield running


@pytest.fixture
def open_page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Open pages in contexts of their own; at the end none may have complained or asked another host."""
    contexts = []
    seen = SimpleNamespace(complaints=[], away=[], may_lose_server=False, may_refuse=False)

    def open_page(url: str, *, theme: str = "light", **options: Any) -> Any:
        options = {"viewport": {"width": 1400, "height": 900}, "color_scheme": theme} | options
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: _console(seen, message))
        page.on("pageerror", lambda error: seen.complaints.append(f"error on the page: {error}"))
        page.on("request", lambda asked: _request(seen, asked.url))
        page.set_default_timeout(SECONDS * 1_000)
        page.goto(url)
        page.locator("h1").first.wait_for()
        return page

    open_page.seen = seen
    yield open_page
    for context in contexts:
        context.close()
    assert seen.complaints == []
    assert seen.away == []


def _console(seen: SimpleNamespace, message: Any) -> None:
    refused = seen.may_refuse and "the server responded with a status of 4" in message.text
    lost = refused or (seen.may_lose_server and "net::ERR" in message.text)
    if message.type in ("error", "warning") and not lost:
        seen.complaints.append(f"{message.type}: {message.text}")


def _request(seen: SimpleNamespace, url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("blob", "data") and parts.hostname != "127.0.0.1":
        seen.away.append(url)
