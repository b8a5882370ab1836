"""Interrupted and resumed equals uninterrupted, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from turnout.experiment import Experiment, load_experiment
from turnout.experiment.methods import load_methods
from turnout.server import RunDirectoryError, RunStore
from turnout.simulation.run import RunSummary, simulate
from turnout.strategies import Callback, RoundReport
from turnout.wire import ConfigError, methods

load_methods()
VARIANTS = {
    slug: [f"strategy.name={slug}"] for slug in sorted(entry.slug for entry in methods("strategy"))
} | {
    "fedstale-fp16": ["strategy.name=fedstale", "strategy.memory=fp16"],
    "fedstale-mmap": ["strategy.name=fedstale", "strategy.memory=mmap"],
    "fedstale-known": ["strategy.name=fedstale", "strategy.participation=known"],
    "fedau-cutoff": ["strategy.name=fedau", "strategy.cutoff=2"],
    "fedamd-sequential": ["strategy.name=fedamd", "strategy.schedule=sequential"],
    "rerce-fed-scheduled": ["strategy.name=rerce-fed", "strategy.continual=false"],
    "two-copies": ["strategy.name=dual-admm", "strategy.form=two-copies"],
    "noisy-link": ["strategy.name=fedavg", "link.sigma_up=0.01", "link.sigma_down=0.01"],
    "markov": ["strategy.name=fedau", "participation.model=markov"],
    "bo-rep": ["strategy.name=bo-rep", "task.name=hyper-representation"],
    "bo-rep-local-upper": ["strategy.name=bo-rep-local-upper", "task.name=hyper-cleaning"],
    "momentum-threads": ["strategy.name=fedavg", "client.momentum=0.9", "simulation.executor=threads"],
}


class StopAfter(Callback):
    """Stands for Ctrl-C once a round is committed."""

    def __init__(self, server_round: int) -> None:
        self.server_round = server_round

    def on_round_end(self, report: RoundReport) -> None:
        if report.server_round == self.server_round:
            raise KeyboardInterrupt


def load(folder: Path, runs: str, overrides: list[str]) -> Experiment:
    shared = ["run.rounds=6", "participation.probabilities=0.4", f"run.directory={folder / runs}"]
    return load_experiment(folder / "small.toml", [*shared, *overrides])


def rows(summary: RunSummary) -> list[dict[str, Any]]:
    """Return the run's history without what a clock measured."""
    lines = [json.loads(line) for line in (summary.directory / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
        line.get("train", {}).pop("train-seconds", None)
    return lines


@pytest.mark.parametrize("name", VARIANTS)
def test_interrupted_and_resumed_equals_uninterrupted(name: str, folder: Path) -> None:
    parts = load(folder, "runs", VARIANTS[name])
    whole = simulate(parts, plots=False)
    with pytest.raises(KeyboardInterrupt):
        simulate(parts, callbacks=[StopAfter(2)], plots=False)
    with pytest.raises(KeyboardInterrupt):
        simulate(parts, resume="last", callbacks=[StopAfter(3)], plots=False)
    resumed = simulate(parts, resume="last", plots=False)
    assert resumed.rounds == whole.rounds == 6
    assert resumed.model_sha256 == whole.model_sha256
    assert resumed.metrics == whole.metrics
    assert rows(resumed) == rows(whole)
    model = "model/model.safetensors"
    assert (resumed.directory / model).read_bytes() == (whole.directory / model).read_bytes()


def test_executors_agree_bit_for_bit(folder: Path) -> None:
    serial = simulate(load(folder, "serial", []), plots=False)
    threads = simulate(
        load(folder, "threads", ["simulation.executor=threads", "simulation.workers=3"]), plots=False
    )
    assert serial.model_sha256 == threads.model_sha256


def test_checkpoints_may_be_rare(folder: Path) -> None:
    whole = simulate(load(folder, "whole", []), plots=False)
    parts = load(folder, "parts", ["run.checkpoint_every=4"])
    with pytest.raises(KeyboardInterrupt):
        simulate(parts, callbacks=[StopAfter(3)], plots=False)
    resumed = simulate(parts, resume="last", plots=False)
    assert resumed.model_sha256 == whole.model_sha256
    assert rows(resumed) == rows(whole)


def test_rounds_may_grow_but_not_shrink(folder: Path) -> None:
    whole = simulate(load(folder, "whole", ["run.rounds=6"]), plots=False)
    short = simulate(load(folder, "parts", ["run.rounds=4"]), plots=False)
    grown = simulate(load(folder, "parts", ["run.rounds=6"]), resume=short.run_id, plots=False)
    assert grown.run_id == short.run_id
    assert grown.model_sha256 == whole.model_sha256
    with pytest.raises(ConfigError, match=r"run\.rounds = 5.*made for 6 rounds"):
        simulate(load(folder, "parts", ["run.rounds=5"]), resume=short.run_id, plots=False)


def test_a_finished_run_can_be_resumed_without_effect(folder: Path) -> None:
    first = simulate(load(folder, "runs", []), plots=False)
    again = simulate(load(folder, "runs", []), resume=first.directory, plots=False)
    assert (again.run_id, again.model_sha256, again.rounds) == (first.run_id, first.model_sha256, 6)
    assert again.metrics == first.metrics


def test_another_experiment_is_refused_with_what_differs(folder: Path) -> None:
    first = simulate(load(folder, "runs", []), plots=False)
    changed = load(folder, "runs", ["client.lr=0.2", "run.seed=5", "simulation.executor=threads"])
    with pytest.raises(ConfigError) as raised:
        simulate(changed, resume=first.run_id, plots=False)
    text = str(raised.value)
    assert "client.lr (was 0.1, is 0.2)" in text
    assert "run.seed (was 0, is 5)" in text
    assert "simulation" not in text  # How it is computed does not change what is.
    with RunStore(folder / "runs") as store:
        assert store.run(first.run_id).status == "finished"


def test_a_run_is_resumed_by_one_process_only(folder: Path) -> None:
    experiment = load(folder, "runs", [])

    class ResumeMeanwhile(Callback):
        def on_round_end(self, report: RoundReport) -> None:
            with pytest.raises(RunDirectoryError, match="in use by another process"):
                simulate(experiment, resume="last", plots=False)

    simulate(experiment, callbacks=[ResumeMeanwhile()], plots=False)


def test_a_failed_build_leaves_nothing_behind(folder: Path) -> None:
    with pytest.raises(ConfigError):
        simulate(load(folder, "runs", ["task.num_clients=0"]))
    assert not (folder / "runs").exists()
