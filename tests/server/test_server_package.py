from __future__ import annotations

import subprocess
import sys

import turnout.server


def test_every_public_name_exists() -> None:
    assert sorted(turnout.server.__all__) == list(turnout.server.__all__)
    for name in turnout.server.__all__:
        assert hasattr(turnout.server, name)


def test_the_server_starts_without_torch_and_without_matplotlib() -> None:
    code = (
        "import sys, turnout.server, turnout.server.plots; "
        "print([m for m in ('torch', 'matplotlib', 'alembic', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_answers_without_them_too() -> None:
    code = (
        "import sys, turnout.cli; "
        "print([m for m in ('torch', 'matplotlib', 'sqlalchemy', 'flwr') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
