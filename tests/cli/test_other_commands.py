from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from turnout.reproduce.report import Claim, Progress, StudyReport, Table
from turnout.server import RunStore
from turnout.wire import MethodEntry, methods, registry

Turnout = Callable[..., Result]


@pytest.fixture
def run_id(turnout: Turnout) -> str:
    result = turnout("simulate", "small.toml", "--json", "-q", "--no-plots")
    return str(json.loads(result.stdout)["run_id"])


def test_runs_are_listed(turnout: Turnout, run_id: str) -> None:
    listed = turnout("runs", "list")
    assert listed.exit_code == 0
    for word in (run_id, "fedavg", "digits", "finished", "4/4", "accuracy"):
        assert word in listed.stdout
    (document,) = json.loads(turnout("runs", "list", "--json").stdout)
    assert document["run_id"] == run_id
    assert document["rounds"] == document["num-rounds"] == 4
    elsewhere = turnout("runs", "list", "--json", "--store", "runs/turnout.sqlite")
    assert json.loads(elsewhere.stdout) == [document]


def test_ids_stay_whole_on_a_narrow_terminal(
    turnout: Turnout, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert run_id in turnout("runs", "list").stdout


def test_a_run_is_shown(turnout: Turnout, run_id: str) -> None:
    shown = turnout("runs", "show", run_id[:5])
    assert f"run {run_id}: fedavg on digits, 4 of 4 rounds, finished" in shown.stdout
    assert "clients a round" in shown.stdout
    document = json.loads(turnout("runs", "show", "--json").stdout)
    assert document["config"]["run"]["name"] == "small"
    assert document["metrics"]["accuracy"] > 0
    directory = document["directory"]
    assert run_id in turnout("runs", "show", directory).stdout
    assert "local_steps = 2" in turnout("runs", "show", run_id, "-v").stdout


def test_a_run_whose_process_is_gone_is_lost(turnout: Turnout, run_id: str) -> None:
    with RunStore("runs") as store:
        run = store.run(run_id)
        store.reopen(run_id, after_round=4, num_rounds=8, config=run.config)
    assert json.loads(turnout("runs", "show", "--json").stdout)["status"] == "lost"
    assert "turnout simulate --resume" in turnout("runs", "show").stderr


def test_a_run_directory_is_enough_to_resume(turnout: Turnout, run_id: str, folder: Path) -> None:
    (folder / "small.toml").unlink()
    directory = json.loads(turnout("runs", "show", "--json").stdout)["directory"]
    for name in (directory, run_id, "last"):
        again = turnout("simulate", "--resume", name, "--json", "--no-plots", "--set", "run.rounds=6")
        assert again.exit_code == 0, again.output
        assert (json.loads(again.stdout)["run_id"], json.loads(again.stdout)["rounds"]) == (run_id, 6)


def test_rounds_and_clients_are_exported(turnout: Turnout, run_id: str, folder: Path) -> None:
    rounds = list(csv.DictReader(io.StringIO(turnout("runs", "export", run_id).stdout)))
    assert [row["round"] for row in rounds] == ["0", "1", "2", "3", "4"]
    assert float(rounds[4]["evaluate.accuracy"]) > 0
    clients = json.loads(turnout("runs", "export", run_id, "--what", "clients", "--format", "json").stdout)
    assert set(clients[0]) >= {"round", "client", "outcome", "weight", "staleness", "train-loss"}
    written = turnout("runs", "export", run_id, "--what", "clients", "-o", "clients.csv")
    assert written.stdout == ""
    assert len((folder / "clients.csv").read_text().splitlines()) == len(clients) + 1


def test_cells_that_a_spreadsheet_would_run_are_quoted() -> None:
    from turnout.server.export import csv_text

    text = csv_text([{"a": "=cmd()", "b": -1.5}, {"a": "fine"}], ["a", "b"])
    assert text == "a,b\n'=cmd(),-1.5\nfine,\n"


def test_plots_are_drawn_again(turnout: Turnout, run_id: str) -> None:
    drawn = turnout("runs", "plot", run_id)
    paths = [Path(line) for line in drawn.stdout.splitlines()]
    assert {path.name for path in paths} >= {"accuracy.png", "loss.svg", "participation.png", "weights.svg"}
    assert all(path.exists() for path in paths)


def test_methods_are_listed(turnout: Turnout) -> None:
    document = json.loads(turnout("methods", "--json").stdout)
    assert all(list(row) == ["slug", "kind", "paper", "class", "summary"] for row in document)
    assert all(row["summary"] for row in document)
    assert {
        "slug": "fedau",
        "kind": "strategy",
        "paper": "2306.03401",
        "class": "turnout.strategies.fedau.FedAU",
    } in [{key: value for key, value in row.items() if key != "summary"} for row in document]
    kinds = {row["kind"] for row in document}
    assert kinds >= {
        "strategy",
        "local-update",
        "task",
        "partitioner",
        "participation",
        "memory",
        "link",
        "study",
    }
    strategies = json.loads(turnout("methods", "--json", "--kind", "strategy").stdout)
    assert {row["kind"] for row in strategies} == {"strategy"}
    assert "fedstale" in turnout("methods").stdout


def test_versions(turnout: Turnout) -> None:
    assert set(json.loads(turnout("version", "--json").stdout)) == {"turnout", "flwr", "torch", "numpy"}
    assert "flwr" in turnout("version").stdout


def study(progress: Progress | None = None) -> StudyReport:
    """Stand in for a study that takes a minute."""
    assert progress is not None
    progress("measuring", 1, 2)
    progress("measuring", 2, 2)

    def plot(stem: Path) -> list[Path]:
        path = stem.with_suffix(".png")
        path.write_bytes(b"")
        return [path]

    return StudyReport(
        slug="tiny",
        seconds=0.5,
        claims=(Claim("it converges", 0.1, 0.2, True), Claim("[it] is fast", "slow", 3, False)),
        tables=(Table.of("A table", ("method", "error"), [("ours [1]", 0.125)]),),
        plots={"curve": plot},
    )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, turnout: Turnout) -> None:
    methods()
    entry = MethodEntry("tiny", "study", "0000.00000", "tests.study", "tiny", study)
    monkeypatch.setitem(registry._entries, ("study", "tiny"), entry)


@pytest.mark.usefixtures("tiny")
def test_a_study_reports_its_claims_and_exits_with_0(turnout: Turnout, folder: Path) -> None:
    result = turnout("reproduce", "tiny")
    assert result.exit_code == 0, result.output  # A claim that does not hold is reported, not hidden.
    for said in ("A table", "ours [1]", "0.125", "it converges", "[it] is fast", "yes", "NO"):
        assert said in result.stdout
    assert "measuring 2/2" in result.stderr
    assert "1 of 2 claims hold" in result.stderr
    (directory,) = (folder / "runs").iterdir()
    assert (directory / "plots" / "curve.png").exists()
    assert json.loads((directory / "report.json").read_text())["tables"][0]["title"] == "A table"


@pytest.mark.usefixtures("tiny")
def test_a_study_in_json_is_one_object(turnout: Turnout) -> None:
    result = turnout("reproduce", "tiny", "--json")
    assert json.loads(result.stdout) == {
        "slug": "tiny",
        "seconds": 0.5,
        "claims": [
            {"claim": "it converges", "measured": 0.1, "baseline": 0.2, "holds": True},
            {"claim": "[it] is fast", "measured": "slow", "baseline": 3, "holds": False},
        ],
    }
