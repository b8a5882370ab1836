from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "benchmarks"), str(HERE.parent / "fleet")]

from fleet_commands import Command, Turnout  # noqa: E402 - found by the line above


@pytest.fixture
def turnout(tmp_path: Path) -> Iterator[Turnout]:
    """Start ``turnout`` commands; what is left of them ends with the test."""
    started: list[Command] = []

    def start(*arguments: object) -> Command:
        started.append(Command(tmp_path, f"{len(started)}", [str(argument) for argument in arguments]))
        return started[-1]

    yield start
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
        command.process.communicate()
