from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from turnout.cli.progress import sparkline
from turnout.experiment import build as build_module
from turnout.server import RunDirectory, RunStore
from turnout.tasks import Task
from turnout.wire import DataError

Turnout = Callable[..., Result]


def run_directories(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "runs").iterdir() if path.is_dir())


def test_a_run_ends_with_a_table_plots_and_what_to_do_next(turnout: Turnout, folder: Path) -> None:
    result = turnout("simulate", "small.toml")
    assert result.exit_code == 0, result.output
    assert "accuracy of the global model" in result.stdout
    assert "clients a round" in result.stdout
    assert "turnout runs show" not in result.stdout  # Talk is not data.
    for said in ("round 4/4", "of 8 clients", "Plots", "--compare fedavg,", "turnout runs show"):
        assert said in result.stderr
    (directory,) = run_directories(folder)
    assert sorted(p.name for p in (directory / "plots").iterdir()) == sorted(
        f"{name}.{kind}"
        for name in ("accuracy", "loss", "participation", "partition", "weights")
        for kind in ("png", "svg")
    )
    assert (directory / "model" / "model.safetensors").exists()
    assert (directory / "clients.csv").exists()
    assert [json.loads(line)["round"] for line in (directory / "metrics.jsonl").open()] == [0, 1, 2, 3, 4]
    assert RunDirectory(directory).in_use() is False


def test_json_is_one_line_and_nothing_else(turnout: Turnout) -> None:
    result = turnout("simulate", "small.toml", "--json", "--no-plots")
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    document = json.loads(result.stdout)
    assert list(document) == ["run_id", "rounds", "metrics", "model_sha256", "seconds"]
    assert document["rounds"] == 4
    assert set(document["metrics"]) == {"accuracy", "loss"}
    assert len(document["model_sha256"]) == 64


def test_quiet_says_nothing_but_the_result(turnout: Turnout) -> None:
    result = turnout("simulate", "small.toml", "--quiet", "--no-plots")
    assert result.stderr == ""
    assert "accuracy" in result.stdout


def test_the_same_seed_gives_the_same_model(turnout: Turnout) -> None:
    hashes = [
        json.loads(turnout("simulate", "small.toml", "--json", "-q", "--no-plots", *more).stdout)[
            "model_sha256"
        ]
        for more in ([], [], ["--set", "run.seed=1"])
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_comparison_is_one_table_one_study_and_its_plots(turnout: Turnout, folder: Path) -> None:
    result = turnout("simulate", "small.toml", "--compare", "fedavg,fedau,mild")
    assert result.exit_code == 0, result.output
    for column in ("strategy", "final accuracy", "best accuracy", "final loss", "rounds to", "time"):
        assert column in result.stdout
    study = next(path for path in run_directories(folder) if "-study-" in path.name)
    names = {path.name for path in (study / "plots").iterdir()}
    assert {"accuracy.png", "loss.svg", "participation.png", "weights.png", "partition.png"} <= names
    rows = json.loads((study / "comparison.json").read_text())
    assert [row["strategy"] for row in rows] == ["fedavg", "fedau", "mild"]
    assert "mild" in (study / "plots" / "accuracy.svg").read_text()
    with RunStore("runs") as store:
        runs = store.runs()
        assert {run.study for run in runs} == {study.name.rpartition("-")[2]}
        assert [run.strategy for run in reversed(runs)] == ["fedavg", "fedau", "mild"]
        # Same participation for all: who came does not depend on the strategy.
        came = [[(c.round, c.client) for c in store.client_rounds(run.id)] for run in runs]
        assert came[0] == came[1] == came[2]
        assert runs[0].config["strategy"]["name"] == "fedstale"
        assert runs[0].config["client"]["lr"] == 0.05


def test_a_comparison_in_json_is_a_line_per_run_and_the_list(turnout: Turnout) -> None:
    result = turnout("simulate", "small.toml", "--compare", "fedavg,mifa", "--json", "--no-plots")
    first, second, table = (json.loads(line) for line in result.stdout.splitlines())
    assert (first["strategy"], second["strategy"]) == ("fedavg", "mifa")
    assert [row["run_id"] for row in table] == [first["run_id"], second["run_id"]]
    assert table[1]["model_sha256"] == second["model_sha256"]
    assert table[0]["rounds-to-target"] is not None


def test_a_comparison_goes_on_where_it_stopped(
    turnout: Turnout, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turnout.simulation import run as simulation_run

    real, calls = simulation_run.RunRecorder.on_round_end, []

    def stop_in_the_second_run(self: simulation_run.RunRecorder, report: object) -> None:
        real(self, report)  # type: ignore[arg-type]
        calls.append(report)
        if len(calls) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(simulation_run.RunRecorder, "on_round_end", stop_in_the_second_run)
    command = ("simulate", "small.toml", "--compare", "fedavg,fedau,mifa", "--json", "--no-plots")
    stopped = turnout(*command)
    assert stopped.exit_code == 130
    assert "--compare fedavg,fedau,mifa --resume" in stopped.stderr
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    resumed = turnout(*command, "--resume", "last")
    assert resumed.exit_code == 0, resumed.output
    whole = turnout(*command)
    hashes = [
        [row["model_sha256"] for row in json.loads(result.stdout.splitlines()[-1])]
        for result in (resumed, whole)
    ]
    assert hashes[0] == hashes[1]
    with RunStore("runs") as store:
        assert len(store.runs()) == 6  # Three a study: the finished and the interrupted run were reused.


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["simulate", "nowhere.toml"], 2, "nowhere.toml does not exist"),
        (["simulate"], 2, "name a file"),
        (["simulate", "small.toml", "--set", "run.rounds=0"], 2, "--set run.rounds=0: run.rounds = 0"),
        (["simulate", "small.toml", "--set", "strategy.name=fedaux"], 2, "Did you mean 'fedau'"),
        (["simulate", "small.toml", "--set", "task.num_clients=0"], 2, "num_clients=0"),
        (["simulate", "small.toml", "--compare", "fedavg,fedag"], 2, "Did you mean 'fedavg'"),
        (["simulate", "small.toml", "--compare", "fedavg,fedavg"], 2, "names fedavg twice"),
        (["simulate", "small.toml", "--compare", ","], 2, "names no strategy"),
        (["simulate", "small.toml", "--resume", "abcd"], 3, "run 'abcd' is not in the store"),
        (["simulate", "--resume", "abcd"], 3, "no run store"),
        (["simulate", "small.toml", "--compare", "fedavg", "--resume", "abcd"], 3, "study 'abcd' is not"),
        (["simulate", "small.toml", "--set", "run.store=nosuch://x"], 3, "nosuch"),
        (["runs", "list"], 3, "no run store"),
        (["methods", "--kind", "strategi"], 2, "Did you mean 'strategy'"),
        (["reproduce", "fedaux"], 2, "unknown study 'fedaux'"),
        (["simulat"], 2, "simulate"),
        (["simulate", "--jso"], 2, "--json"),
    ],
)
def test_errors_are_short_and_have_their_exit_code(
    turnout: Turnout, folder: Path, arguments: list[str], code: int, said: str
) -> None:
    result = turnout(*arguments)
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    if (folder / "runs").exists():
        assert run_directories(folder) == []


def test_missing_data_fail_with_what_to_install(turnout: Turnout, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Task:
        raise DataError("task 'digits' needs scikit-learn; pip install scikit-learn.")

    monkeypatch.setattr(build_module, "_build_task", missing)
    result = turnout("simulate", "small.toml")
    assert (result.exit_code, "pip install scikit-learn" in result.stderr) == (1, True)


def test_an_unexpected_error_has_its_traceback_on_request_only(
    turnout: Turnout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Task:
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr(build_module, "_build_task", broken)
    plain = turnout("simulate", "small.toml")
    assert (plain.exit_code, "Traceback" in plain.stderr) == (1, False)
    assert "unexpected ZeroDivisionError: deep inside" in plain.stderr
    assert "Traceback" in turnout("simulate", "small.toml", "-v").stderr


def test_a_target_that_is_not_reached_has_its_own_exit_code(turnout: Turnout) -> None:
    near = turnout("simulate", "small.toml", "-q", "--no-plots", "--set", "run.target_accuracy=0.01")
    assert near.exit_code == 0
    far = turnout("simulate", "small.toml", "-q", "--no-plots", "--set", "run.target_accuracy=1.0")
    assert far.exit_code == 4
    assert "target_accuracy = 1 was not reached" in far.stderr
    both = turnout(
        "simulate",
        "small.toml",
        "-q",
        "--no-plots",
        "--set",
        "run.target_accuracy=1.0",
        "--compare",
        "fedavg,mifa",
    )
    assert both.exit_code == 4
    assert "never" in both.stdout


def test_a_failing_client_is_told_with_its_traceback_and_counted(
    turnout: Turnout, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turnout.tasks import Digits

    real = Digits.client_data

    def client_data(self: Digits, client: int) -> object:
        if client == 2:
            raise RuntimeError("the disk of client 2 is gone")
        return real(self, client)

    monkeypatch.setattr(Digits, "client_data", client_data)
    result = turnout("simulate", "small.toml", "--no-plots", "--set", "participation.probabilities=1.0")
    assert result.exit_code == 0, result.output
    assert "client 2 failed in round 1" in result.stderr
    assert "Traceback" in result.stderr
    assert "the disk of client 2 is gone" in result.stderr
    assert "4 failed" in result.stdout
    shown = turnout("runs", "show")
    assert "4 x failed: RuntimeError: the disk of client 2 is gone (first: client 2, round 1)" in shown.stdout


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_says_how_to_go_on(folder: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "turnout.cli",
            "simulate",
            "small.toml",
            "--set",
            "run.rounds=100000",
            "--no-plots",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "/100000" in line and "round 1/" not in line:
            break
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "turnout simulate small.toml --resume " in err
    assert out == ""
    with RunStore("runs") as store:
        assert store.run("last").status == "interrupted"


def test_colours_can_be_switched_off(turnout: Turnout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    turnout("simulate", "small.toml", "-q", "--no-plots")
    assert "\x1b[32m" in turnout("runs", "list").stdout
    assert "\x1b[32m" not in turnout("runs", "list", "--no-color").stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in turnout("runs", "list").stdout


def test_sparklines() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([1.0, float("nan"), 2.0]) == "▁ █"
    assert sparkline([float("nan")]) == ""
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert len(sparkline([float(i) for i in range(99)])) == 24


def test_a_run_in_which_no_reply_could_be_used_says_so(turnout: Turnout) -> None:
    result = turnout("simulate", "small.toml", "--quiet", "--no-plots", "--set", "client.lr=1e30")
    assert result.exit_code == 0
    assert "no client gave a reply that could be used" in result.stderr
    assert "no client gave" not in turnout("simulate", "small.toml", "--quiet", "--no-plots").stderr
