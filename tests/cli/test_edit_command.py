"""``turnout edit`` on a finished run: the table, the files, and what it refuses."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from turnout.wire import view
from turnout.wire.model_file import read_model

Turnout = Callable[..., Result]
PLANTED = """
[run]
name = "planted"
rounds = 2

[task]
name = "planted-labels"
num_clients = 3
train_examples = 90
width = 24

[client]
optimizer = "adam"
lr = 0.005
local_epochs = 10
"""


@pytest.fixture
def run(turnout: Turnout, folder: Path) -> Path:
    (folder / "planted.toml").write_text(PLANTED)
    assert turnout("simulate", "planted.toml", "--no-plots", "-q").exit_code == 0
    return next(folder.glob("runs/*-planted-*"))


def test_it_shows_each_edit_beside_the_model(turnout: Turnout, run: Path) -> None:
    done = turnout("edit", "last", "--rho", "0.99,0.5,1")
    assert done.exit_code == 0, done.output
    for words in ("memorised", "recovered", "rho 0.99", "rho 0.5", "worst client, own data", "components"):
        assert words in done.output
    report = json.loads((run / "model" / "edit.json").read_text())
    assert [edit["rho"] for edit in report["edits"]] == [0.99, 0.5, 1.0]
    assert report["examples"] == 90
    assert list(report["before"]["clients"]) == ["0", "1", "2"]
    before = read_model(run / "model" / "model.safetensors")
    same, edited = (read_model(run / "model" / f"edited-{rho}.safetensors") for rho in ("1", "0.5"))
    assert report["edits"][2]["metrics"] == report["before"]["metrics"]
    assert all((view(same[name]) == view(before[name])).all() for name in before)
    changed = [name for name in before if not (view(edited[name]) == view(before[name])).all()]
    assert changed == ["3.weight"]
    kept = [edit["layers"]["3"]["kept"] for edit in report["edits"]]
    assert kept[1] < kept[0] < kept[2] == 1.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rho", "1.5"], "rho=1.5 is not possible"),
        (["--rho", "much"], "--rho much: write numbers from 0 to 1"),
        (["--layers", "3,9"], "'9' has no weight matrix; this model has 1, 3, 5"),
        (["--insecure"], "give --address as well"),
    ],
)
def test_bad_usage(turnout: Turnout, run: Path, arguments: list[str], words: str) -> None:
    done = turnout("edit", "last", *arguments)
    assert done.exit_code == 2
    assert words in done.output.replace("\n", " ")


@pytest.mark.parametrize("lost", ["the file", "the end"])
def test_a_run_without_a_final_model(turnout: Turnout, run: Path, lost: str) -> None:
    if lost == "the file":
        (run / "model" / "model.safetensors").unlink()
    else:  # It went on, for more rounds, and was stopped: the file is the model of before.
        with sqlite3.connect(run.parent / "turnout.sqlite") as store:
            store.execute("UPDATE runs SET status = 'interrupted'")
    done = turnout("edit", str(run))
    assert done.exit_code == 2
    assert "has no final model yet" in done.output.replace("\n", " ")
