"""examples/own_app: a server and two nodes fit the line, as the docs say."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from fleet_commands import Turnout, free_port
from safetensors.numpy import load_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "own_app"


def test_the_own_app_example_learns_the_line(
    place: Path, turnout: Turnout, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("own_app.py", "own_app.toml"):
        shutil.copy(EXAMPLES / name, place)
    monkeypatch.chdir(place)
    runpy.run_path("own_app.py", run_name="__main__")
    address = f"127.0.0.1:{free_port()}"
    server = turnout("server", "own_app.toml", "--address", address, "--json", "--no-plots")
    shared = ("client", "--server", address, "--app", "own_app:app", "--json", "--clients")
    nodes = [turnout(*shared, client) for client in (0, 1)]
    assert server.end()["rounds"] == 20
    assert [node.end()["reason"] for node in nodes] == ["the run is over"] * 2
    [model] = place.glob("runs/*/model/model.safetensors")
    assert np.allclose(load_file(model)["line"], [3.0, -1.0], atol=0.05)
