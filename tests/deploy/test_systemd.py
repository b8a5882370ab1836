"""The systemd units: systemd's own verdict, and commands that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
Analyze = Callable[..., "subprocess.CompletedProcess[str]"]
UNITS = ("turnout-server.service", "turnout-client@.service", "turnout-dashboard.service")


def installed(unit: str, tmp_path: Path) -> Path:
    """Return the unit as it would be installed here: with this environment's command."""
    turnout = Path(sys.executable).parent / "turnout"
    text = (FOLDER / unit).read_text().replace("/opt/turnout/bin/turnout", str(turnout))
    path = tmp_path / unit.replace("@.", "@edge-1.")
    path.write_text(text)
    return path


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_understands_every_line(unit: str, systemd_analyze: Analyze, tmp_path: Path) -> None:
    done = systemd_analyze("verify", installed(unit, tmp_path))
    assert (done.returncode, done.stderr) == (0, "")  # Unknown keys are told, and change no exit code.
    broken = tmp_path / "broken.service"
    broken.write_text(installed(unit, tmp_path).read_text().replace("ProtectClock=", "ProtectCock="))
    assert "ProtectCock" in systemd_analyze("verify", broken).stderr


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_hardened(unit: str, systemd_analyze: Analyze, tmp_path: Path) -> None:
    done = systemd_analyze("security", "--offline=yes", "--threshold=20", installed(unit, tmp_path))
    assert done.returncode == 0, done.stdout[-300:]  # 2.0 of 10.


@pytest.mark.parametrize("unit", UNITS)
def test_its_variables_are_in_the_example(unit: str) -> None:
    text = (FOLDER / unit).read_text()
    (file,) = re.findall(r"^EnvironmentFile=/etc/turnout/(\w+)\S*\.env$", text, flags=re.MULTILINE)
    example = (FOLDER / f"{file}.env").read_text()
    known = set(re.findall(r"^(\w+)=", example, flags=re.MULTILINE))
    used = set(re.findall(r"\$\{?(TURNOUT_\w+)", text))
    assert used <= known
    assert "TOKEN=" not in example
    assert "PASSWORD" not in example


def test_the_command_lines_are_understood(tmp_path: Path) -> None:
    turnout = Path(sys.executable).parent / "turnout"
    for command, absent in (("server", "no.toml"), ("client", "no.toml")):
        done = subprocess.run(
            [turnout, command, absent, "--help"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0
    refused = subprocess.run(
        [turnout, "server", "no.toml", "--resume", "auto"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 2  # As RestartPreventExitStatus= has it.
    for unit in UNITS[:2]:
        assert re.search(r"^RestartPreventExitStatus=2\b", (FOLDER / unit).read_text(), flags=re.MULTILINE)
