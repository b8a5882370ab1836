"""Clients' settings that a strategy's own work does not allow are told before the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from turnout.experiment import load_experiment
from turnout.wire import ConfigError

# FedStale's clients may train as they like; each of these strategies is named instead.
BASE = """
[task]
name = "digits"
num_clients = 2
[strategy]
name = "fedstale"
[run]
rounds = 1
"""
MISFITS = [
    (
        "scaffold",
        ['client.optimizer="adamw"'],
        r"optimizer='adamw'.*'scaffold'.*use optimizer='sgd'",
    ),
    ("fedamd", ["client.momentum=0.9"], r"momentum=0\.9.*'fedamd'.*'miner'.*use momentum=0"),
    (
        "fedamd",
        ["client.momentum=0.9", 'client.optimizer_state="keep"'],
        r"optimizer_state='keep'.*use optimizer_state='reset'",
    ),
    ("eggroll", ['client.optimizer="adamw"'], r"'eggroll'.*no step with the optimizer; use optimizer='sgd'"),
    ("eggroll", ['client.precision="bf16-mixed"'], r"precision='bf16-mixed'.*float32"),
    ("fedprox", ['client.optimizer="adamw"'], ""),
    ("bo-rep", [], r"name='digits': strategy 'bo-rep'.*upper level; use task.name='hyper-representation'"),
]


@pytest.mark.parametrize(("strategy", "overrides", "message"), MISFITS)
def test_clients_that_do_not_fit_the_strategy(
    strategy: str, overrides: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "trial.toml").write_text(BASE)
    experiment = load_experiment(tmp_path / "trial.toml", overrides)
    if not message:
        assert experiment.variant(strategy).label == strategy
        return
    with pytest.raises(ConfigError, match=message):
        experiment.variant(strategy)
