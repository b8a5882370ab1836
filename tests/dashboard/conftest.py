from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from turnout.dashboard import Dashboard, DashboardOptions
from turnout.server import RunStore

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

from dashboard_runs import METHODS, STRATEGIES, simulate_into  # noqa: E402 - found by the line above


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three real runs of one comparison."""
    folder = tmp_path_factory.mktemp("recorded") / "runs"
    for strategy in STRATEGIES:
        simulate_into(folder, strategy)
    return folder


@pytest.fixture
def own_store(recorded: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(recorded, tmp_path / "runs"))


@pytest.fixture(scope="session")
def served(recorded: Path) -> Iterator[Dashboard]:
    with Dashboard(recorded, DashboardOptions(port=0), catalogue=lambda: METHODS) as dashboard:
        yield dashboard


@pytest.fixture(scope="session")
def api(served: Dashboard) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{served.url}api/v1/", timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def store(recorded: Path) -> Iterator[RunStore]:
    with RunStore(recorded, create=False) as opened:
        yield opened


@pytest.fixture(scope="session")
def run(store: RunStore) -> str:
    """The run of FedAMD, whose clients have roles."""
    return next(row.id for row in store.runs() if row.strategy == "fedamd")
