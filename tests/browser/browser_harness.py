"""What the browser tests start and ask: dashboards, simulations, the API, pictures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from turnout.dashboard import Dashboard

REPOSITORY = Path(__file__).resolve().parents[2]
SCREENSHOTS = REPOSITORY / "screenshots"
BUILT = REPOSITORY / "server/turnout/dashboard/static/index.html"
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
TURNOUT = (sys.executable, "-m", "turnout.cli")
DIGITS = ("examples/digits.toml", "--no-plots", "-q")
SECONDS = 20


def unavailable(reason: str) -> None:
    """Skip with the reason; fail where everything is expected to be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def started(*words: str, **options: Any) -> subprocess.Popen[str]:
    """Start a command of ours in the repository."""
    return subprocess.Popen(
        words, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )


def simulate(store: Path, *words: str) -> subprocess.Popen[str]:
    """Start a real simulation that writes into ``store``."""
    return started(*TURNOUT, "simulate", *DIGITS, "--set", f"run.directory={store}", *words)


class DashboardProcess:
    """A running `turnout dashboard` that can be killed and started again on the same port."""

    def __init__(self, store: Path, *words: str) -> None:
        self.store, self.words, self.port, self.process = store, words, 0, None
        self.start()

    def start(self) -> None:
        """Start it; the port is free at first and the same from then on."""
        self.process = started(
            *TURNOUT, "dashboard", "--store", str(self.store), "--port", str(self.port), *self.words
        )
        said = []
        for line in self.process.stdout:
            said.append(line)
            found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
            if found:
                self.port = int(found[1])
                return
        raise AssertionError(f"the dashboard ended: {''.join(said)}")

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}/"

    def kill(self) -> None:
        """Kill it as a crash would."""
        self.process.kill()
        self.process.wait(SECONDS)
        self.process.stdout.close()


def ask(dashboard: Dashboard | DashboardProcess, path: str) -> Any:
    """Return what the API answers."""
    with urllib.request.urlopen(f"{dashboard.url}api/v1/{path}", timeout=SECONDS) as answer:
        return json.load(answer)


def runs_by_strategy(dashboard: Dashboard | DashboardProcess) -> dict[str, str]:
    """Return the runs' ids by strategy."""
    return {run["strategy"]: run["id"] for run in ask(dashboard, "runs")["items"]}


def choose_theme(page: Any, theme: str) -> None:
    """Let the system be light or dark; a browser tells pages of it with a frame, so ask for them."""
    page.emulate_media(color_scheme=theme)
    end = time.monotonic() + SECONDS
    while page.locator("html").get_attribute("data-theme") != theme:
        assert time.monotonic() < end, f"the page does not turn {theme}"
        page.evaluate("() => new Promise((done) => requestAnimationFrame(done))")


def screenshot(page: Any, name: str) -> None:
    """Keep a picture for who wants to look at it."""
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
