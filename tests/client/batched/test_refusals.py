"""What the batched trainer does not do, what concerns one client only, and what it must not cost."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord
from torch import nn

from turnout.client import TrainOptions
from turnout.client.batched import BatchedTrainer, CohortWork
from turnout.client.batched.stacked_model import StackedModel
from turnout.wire import ConfigError, as_array
from turnout.wire.errors import DataError


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), "buffers"),
        (lambda: nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5)), "draws random numbers"),
    ],
)
def test_modules_that_cannot_be_stacked(make_custom, build, reason):
    trainer = BatchedTrainer(make_custom(build, (3,), (5,)), TrainOptions())
    assert reason in trainer.refusal("sgd")


def test_tied_parameters_cannot_be_stacked(make_custom):
    def build():
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        module[1].weight = module[0].weight
        return module

    assert "one tensor" in BatchedTrainer(make_custom(build, (3,), (4,)), TrainOptions()).refusal("sgd")


def test_optimizers_that_mix_parameters_and_unknown_updates(make_task):
    trainer = BatchedTrainer(make_task("mlp"), TrainOptions(optimizer="adafactor"))
    assert "adafactor" in trainer.refusal("sgd")
    assert trainer.refusal("anchor") is None
    assert "'mine'" in trainer.refusal("mine")


def test_a_client_without_examples_fails_alone(cohorts, make_task):
    both = cohorts(make_task("mlp", (4, 5)), batch_size=2)
    both.task.data[0] = type(both.task.data[0])(both.task.data[0].x[:0], both.task.data[0].y[:0])
    work = CohortWork(1, "sgd", 0.1, ConfigRecord(), both.vector(), {})
    out, outcome = both.batched(work, [0, 1])
    assert list(outcome.failures) == [0]
    assert isinstance(outcome.failures[0], DataError)
    assert np.isnan(outcome.losses[0])
    assert np.isfinite(out[1]).all()


def test_a_client_with_another_models_state_fails_alone(cohorts, make_task):
    both = cohorts(make_task("mlp", (4, 5)), batch_size=2)
    work = CohortWork(1, "dyn", 0.1, ConfigRecord({"dyn-alpha": 0.1}), both.vector(), {})
    both.batched(work, [0, 1])
    both.stores[1]["turnout.dyn.vectors"] = ArrayRecord({"regulariser": as_array(np.zeros(3))})
    later = CohortWork(2, "dyn", 0.1, ConfigRecord({"dyn-alpha": 0.1}), both.vector(), {})
    out, outcome = both.batched(later, [0, 1])
    assert list(outcome.failures) == [1]
    assert "clear the state" in str(outcome.failures[1])
    assert np.isfinite(out[0]).all()


@pytest.mark.parametrize(
    ("local_update", "missing"),
    [("prox", "proximal-mu"), ("scaffold", "control"), ("miner", "bullseye"), ("admm", "rho")],
)
def test_what_the_strategy_must_send(cohorts, make_task, local_update, missing):
    both = cohorts(make_task("softmax"))
    work = CohortWork(1, local_update, 0.1, ConfigRecord(), both.vector(), {})
    _, outcome = both.batched(work, [0, 1])
    assert sorted(outcome.failures) == [0, 1]
    for failure in outcome.failures.values():
        assert isinstance(failure, ConfigError)
        assert missing in str(failure)


def test_a_client_with_impossible_labels_fails_alone(cohorts, make_task):
    both = cohorts(make_task("mlp", (4, 5, 3)), batch_size=2)
    both.task.data[1].y[:] = 9
    work = CohortWork(1, "dyn", 0.1, ConfigRecord({"dyn-alpha": 0.1}), both.vector(), {})
    out, outcome = both.batched(work, [0, 1, 2])
    assert list(outcome.failures) == [1]
    assert np.isfinite(out[[0, 2]]).all()
    assert [bool(store) for store in both.stores] == [True, False, True]


def test_clients_without_a_start_fail_without_the_others(cohorts, make_task):
    both = cohorts(make_task("mlp", (4, 5, 3)), batch_size=2)
    config = ConfigRecord({"rho": 0.5})
    both.batched(CohortWork(1, "admm", 0.1, config, both.vector(), {}), [0, 2])
    _, outcome = both.batched(CohortWork(2, "admm", 0.1, config, both.vector(), {}), [0, 1, 2])
    assert list(outcome.failures) == [1]
    assert "client 1 keeps no" in str(outcome.failures[1])


def test_no_module_is_copied_or_read_out_for_a_client(cohorts, make_task, monkeypatch):
    both = cohorts(make_task("cnn"), batch_size=4)
    work = CohortWork(1, "sgd", 0.1, ConfigRecord(), both.vector(), {})

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("not for every client")

    for name in ("state_dict", "load_state_dict"):
        monkeypatch.setattr(nn.Module, name, forbidden)
    monkeypatch.setattr(copy, "deepcopy", forbidden)
    _, outcome = both.batched(work, range(7))
    assert not outcome.failures


def test_a_chunk_is_bounded(make_task):
    trainer = BatchedTrainer(make_task("mlp"), TrainOptions(device="cpu"))
    assert trainer.chunk(100) == 1024
    assert trainer.chunk(10**9) == 16


def test_no_chunk_is_left_with_few_clients(cohorts, make_task, monkeypatch):
    both = cohorts(make_task("mlp", (5, 5, 5, 5)), batch_size=2)
    monkeypatch.setattr("turnout.client.batched.trainer._CPU_CLIENTS", 3)
    begin, counts = StackedModel.begin, []

    def counted(model: StackedModel, count: int, vector: np.ndarray) -> None:
        counts.append(count)
        begin(model, count, vector)

    monkeypatch.setattr(StackedModel, "begin", counted)
    both.batched(CohortWork(1, "sgd", 0.1, ConfigRecord(), both.vector(), {}), range(4))
    assert counts == [2, 2]
