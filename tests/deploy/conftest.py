from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

from compose_stack import ComposeStack  # noqa: E402 - found by the line above


def need(tool: str, how: str) -> None:
    """Skip the test when ``tool``, a command or a module, is absent; fail where everything must be there."""
    beside = Path(sys.executable).parent / tool
    if shutil.which(tool) or beside.exists() or (tool.isidentifier() and importlib.util.find_spec(tool)):
        return
    said = f"needs {tool}: {how}"
    if os.environ.get("CI") == "true":
        pytest.fail(said)
    pytest.skip(said)


@pytest.fixture(scope="session")
def promtool() -> str:
    need("promtool", "apt-get install prometheus")
    return "promtool"


@pytest.fixture(scope="session")
def systemd_analyze() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return what runs systemd-analyze with arguments."""
    need("systemd-analyze", "apt-get install systemd")

    def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = ["systemd-analyze", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return analyze


@pytest.fixture(scope="session")
def deploy_tool() -> object:
    """Return what skips a test without one of the tools of the extra deploy-test."""
    return lambda tool: need(tool, "pip install -e '.[deploy-test]', or make test-deploy")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeStack]:
    """Run docker-compose.yml as processes of this machine, until the tests are over."""
    need("prometheus", "apt-get install prometheus")
    with ComposeStack(tmp_path_factory.mktemp("stack")) as running:
        yield running
