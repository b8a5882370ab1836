from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

SMALL = """
[run]
name = "small"
rounds = 4

[task]
name = "digits"
num_clients = 8
partition = "label-mix"
min_examples = 1

[client]
lr = 0.1
batch_size = 16
local_steps = 2

[strategy]
name = "fedavg"

[participation]
model = "bernoulli"
probabilities = 0.6

[strategies.mild]
name = "fedstale"
beta = 0.2
client.lr = 0.05
"""

Turnout = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of its own with a small experiment, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path


@pytest.fixture
def turnout(folder: Path) -> Turnout:
    """Run the command line in this process."""
    from turnout.cli import app

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments))

    return run
