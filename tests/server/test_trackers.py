"""TensorBoard and MLflow beside a run, read back with their own readers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from turnout.experiment import Experiment, load_experiment
from turnout.server import RunStore
from turnout.server.recorder import RunRecorder
from turnout.server.trackers import TrackerSpec, TrackingCallback
from turnout.simulation.run import RunSummary, simulate
from turnout.strategies import Callback, RoundReport
from turnout.wire import ConfigError

ROUNDS = 6


class StopAfter(Callback):
    def __init__(self, server_round: int) -> None:
        self.server_round = server_round

    def on_round_end(self, report: RoundReport) -> None:
        if report.server_round == self.server_round:
            raise KeyboardInterrupt


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    file = tmp_path / "small.toml"
    file.write_text(
        f'[run]\nname = "tracked"\nrounds = {ROUNDS}\ncheckpoint_every = 2\n'
        '[task]\nname = "digits"\nmodel = "softmax"\nnum_clients = 3\n'
    )
    return load_experiment(file, [f"run.directory={tmp_path / 'runs'}"])


def track(
    experiment: Experiment, warnings: list[str], *wanted: str, resume: str | None = None, stop: int = 0
) -> RunSummary | None:
    """Run the experiment with trackers; return None when it was stopped after round ``stop``."""
    try:
        with TrackingCallback([TrackerSpec.parse(text) for text in wanted], warnings.append) as trackers:

            def started(recorder: RunRecorder) -> None:
                trackers.begin(recorder.run, recorder.directory.path)

            callbacks = [trackers, StopAfter(stop)]
            return simulate(experiment, resume=resume, callbacks=callbacks, started=started, plots=False)
    except KeyboardInterrupt:
        return None


def losses(experiment: Experiment) -> dict[int, float]:
    """Return the losses that the run store has, by round."""
    with RunStore(experiment.run.directory) as store:
        path = store.directory_of(store.run("last")) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["round"]: line["evaluate"]["loss"] for line in lines if line["round"]}


def read_events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_goes_on_where_a_run_was_stopped(experiment: Experiment, tmp_path: Path) -> None:
    warnings: list[str] = []
    assert track(experiment, warnings, f"tensorboard:{tmp_path / 'tb'}", stop=3) is None
    summary = track(experiment, warnings, f"tensorboard:{tmp_path / 'tb'}", resume="last")
    assert summary is not None
    (folder,) = (tmp_path / "tb").iterdir()
    assert folder.name == summary.directory.name
    assert len(list(folder.iterdir())) == 2
    events = read_events(folder)
    scalars = events.Scalars("evaluate/loss")
    assert [event.step for event in scalars] == list(range(1, ROUNDS + 1))  # Round 3 was computed twice.
    for event in scalars:
        assert event.value == pytest.approx(losses(experiment)[event.step], rel=1e-6)
    assert [event.value for event in events.Scalars("clients/ok")] == [3.0] * ROUNDS
    assert events.Tensors("model-sha256")[0].tensor_proto.string_val[0].decode() == summary.model_sha256
    assert b"task.num_clients | 3" in events.Tensors("experiment")[0].tensor_proto.string_val[0]
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert not warnings


def test_tensorboard_is_in_the_run_directory_by_default(experiment: Experiment) -> None:
    summary = track(experiment, [], "tensorboard")
    assert summary is not None
    assert len(read_events(summary.directory / "tensorboard").Scalars("evaluate/accuracy")) == ROUNDS


def test_mlflow_goes_on_in_the_same_run(experiment: Experiment, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    warnings: list[str] = []
    assert track(experiment, warnings, f"mlflow:{uri}", stop=3) is None
    client = MlflowClient(uri)
    made = client.get_experiment_by_name("tracked")
    assert made is not None
    assert [run.info.status for run in client.search_runs([made.experiment_id])] == ["KILLED"]
    longer = Experiment.from_dict(
        {**experiment.resolved(), "run": {**experiment.resolved()["run"], "rounds": 8}}
    )
    summary = track(longer, warnings, f"mlflow:{uri}", resume="last")
    assert summary is not None
    (run,) = client.search_runs([made.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "evaluate/loss")
    assert [metric.step for metric in history] == list(range(1, 9))
    assert {metric.step: metric.value for metric in history} == losses(experiment)
    assert run.data.params["task.num_clients"] == "3"
    assert run.data.params["run.rounds"] == str(ROUNDS)  # As it began; MLflow's parameters never change.
    assert run.data.tags["resumed.run.rounds"] == "8"
    assert run.data.tags["turnout.model_sha256"] == summary.model_sha256
    assert run.data.tags["turnout.run_id"] == summary.run_id
    assert not warnings


def test_a_tracker_that_fails_is_left_out(experiment: Experiment, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be")
    warnings: list[str] = []
    summary = track(experiment, warnings, f"tensorboard:{tmp_path / 'taken'}", "tensorboard")
    assert summary is not None
    assert summary.rounds == ROUNDS
    assert len(warnings) == 1
    assert warnings[0].startswith("--log-to tensorboard: left out from now on, the run goes on: ")
    assert len(read_events(summary.directory / "tensorboard").Scalars("evaluate/loss")) == ROUNDS
    assert not [thread for thread in threading.enumerate() if thread.name == "turnout-tensorboard"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tensorbord", "did you mean|tensorboard"),
        ("mlflow:", "nothing follows the colon"),
        ("wandb", "mlflow"),
    ],
)
def test_a_tracker_that_does_not_exist(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrackerSpec.parse(text)


def test_a_comparison_shows_each_of_its_runs(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(
        '[run]\nrounds = 2\n[task]\nname = "digits"\nmodel = "softmax"\nnum_clients = 2\n'
    )
    command = [sys.executable, "-m", "turnout.cli", "simulate", "x.toml", "--compare", "fedavg,fedau"]
    command += ["--log-to", "tensorboard:tb", "--no-plots"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / "tb").iterdir(), key=lambda path: path.name)
    assert sorted(folder.name.split("-")[3] for folder in folders) == ["fedau", "fedavg"]
    for folder in folders:
        assert len(read_events(folder).Scalars("evaluate/loss")) == 2


def test_a_missing_extra_names_its_command(tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util as u; real = u.find_spec; "
        "u.find_spec = lambda n, *a: None if n == 'mlflow' else real(n, *a); "
        "from turnout.cli import main; "
        "sys.argv = ['turnout', 'simulate', 'x.toml', '--log-to', 'mlflow']; main()"
    )
    (tmp_path / "x.toml").write_text("[run]\nrounds = 1\n")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 2
    assert "pip install 'turnout[mlflow]'" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_server_with_trackers_loads_no_torch() -> None:
    code = (
        "import sys; import turnout.server.trackers.tensorboard, turnout.server.trackers.mlflow; "
        "assert not {'torch', 'tensorflow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
