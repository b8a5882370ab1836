"""Says what a failure here means: Flower has changed, and where Turnout meets it."""

from __future__ import annotations

import sys
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flwr
import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]
WRITTEN_FOR = "1.41"


def flower_version() -> str:
    """Return the version of the flwr that is imported, which need not be the one installed first."""
    return str(getattr(flwr, "__version__", None) or version("flwr"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, pytest.TestReport]:
    report: pytest.TestReport = yield
    if report.failed and HERE in item.path.parents:
        report.sections.append(
            (
                f"flwr {flower_version()} is not what Turnout relies on (written for {WRITTEN_FOR})",
                "Private parts are met in proto/turnout/wire/flower.py only; what stock strategies keep is\n"
                "listed in strategies/turnout/strategies/stock_state.py. Adapt these, then the tables in\n"
                "tests/flower/contract/surface.py, and widen the requirement on flwr in pyproject.toml.",
            )
        )
    return report
