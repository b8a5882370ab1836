"""Every local update on every kind of model, against the serial trainer, over several rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord

from turnout.client.batched import CohortWork

UPDATES = [
    ("sgd", {}, ()),
    ("prox", {"proximal-mu": 0.3}, ()),
    ("dyn", {"dyn-alpha": 0.3}, ()),
    ("scaffold", {}, ("control",)),
    ("miner", {}, ("bullseye",)),
    ("anchor", {}, ()),
    ("admm", {"rho": 0.5}, ("initial",)),
    ("admm", {"rho": 0.5, "continual": True}, ("initial",)),
    ("admm", {"rho": 0.5, "extrapolate": True}, ("initial",)),
    ("dual-admm", {"rho": 0.5}, ("initial",)),
]
MODELS = ["softmax", "mlp", "cnn", "lenet", "two-branches"]
NAMES = [
    "-".join([name, *(key for key in config if key in ("continual", "extrapolate"))])
    for name, config, _ in UPDATES
]


@pytest.mark.parametrize(("local_update", "config", "records"), UPDATES, ids=NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_every_update_on_every_model(cohorts, make_task, monkeypatch, model, local_update, config, records):
    monkeypatch.setattr("turnout.client.batched.vmap_engine._FEW", 2)
    cohorts(make_task(model), batch_size=10, seed=5).compare(local_update, config, records, rounds=(1, 2, 4))


@pytest.mark.parametrize(("local_update", "config", "records"), UPDATES, ids=NAMES)
def test_least_squares_in_gradient_form(cohorts, quadratic, local_update, config, records):
    options = {"batch_size": 3, "lr": 0.05, "closed_form": False}
    cohorts(quadratic, **options).compare(local_update, config, records, rounds=(1, 2, 4))


@pytest.mark.parametrize(("local_update", "config", "records"), UPDATES[6:], ids=NAMES[6:])
def test_closed_form_admm(cohorts, quadratic, local_update, config, records):
    cohorts(quadratic).compare(local_update, config, records, rounds=(1, 2, 4), tolerance=0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9, "weight_decay": 0.01},
        {"weight_decay": 0.02, "local_steps": 7},
        {"local_epochs": 3, "batch_size": 8},
        {"local_epochs": 2, "batch_size": 100},
        {"local_steps": 1},
        {"batch_size": 1},
        {"anchor_batch_size": 5, "reference": "fresh", "weight_decay": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["mlp", "two-branches"])
def test_options(cohorts, make_task, monkeypatch, model, options):
    monkeypatch.setattr("turnout.client.batched.vmap_engine._FEW", 3)
    for local_update, config, records in UPDATES:
        if options.get("momentum") and local_update in ("scaffold", "miner"):
            continue
        both = cohorts(make_task(model), **{"batch_size": 10, "seed": 2, **options})
        both.compare(local_update, config, records, rounds=(1, 2) if model == "mlp" else (2,))


@pytest.mark.parametrize(
    "name", ["adadelta", "adagrad", "Adam", "adamax", "adamw", "asgd", "nadam", "radam", "rmsprop", "rprop"]
)
def test_optimizers_of_torch(cohorts, make_task, name):
    both = cohorts(make_task("mlp"), optimizer=name, lr=0.01, batch_size=6, local_epochs=2)
    both.compare("sgd", rounds=(1,), tolerance=1e-8)
    both.compare("prox", {"proximal-mu": 0.3}, rounds=(2,), tolerance=1e-8)


@pytest.mark.parametrize("model", MODELS)
def test_single_precision(cohorts, make_task, model):
    task = make_task(model, dtype=torch.float32)
    for local_update, config in (("sgd", {}), ("prox", {"proximal-mu": 0.3}), ("anchor", {})):
        cohorts(task, batch_size=10, lr=0.05).compare(local_update, config, rounds=(1,), tolerance=1e-5)


def test_anchors_of_large_sets_go_in_pieces(cohorts, make_task):
    cohorts(make_task("mlp", (700, 300, 5))).compare("anchor")


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("model", ["mlp", "cnn", "two-branches"])
def test_who_else_is_trained_does_not_matter(cohorts, make_task, monkeypatch, model, at_once):
    monkeypatch.setattr("turnout.client.batched.trainer._CPU_CLIENTS", at_once)
    monkeypatch.setattr("turnout.client.batched.trainer._CPU_FEW", 0)
    cohorts(make_task(model), batch_size=10).compare("dyn", {"dyn-alpha": 0.3})


def test_the_order_of_clients_does_not_matter(cohorts, make_task):
    both = cohorts(make_task("mlp"), batch_size=10)
    work = CohortWork(3, "sgd", 0.1, ConfigRecord(), both.vector(), {})
    forward, one = both.batched(work, [0, 1, 2, 3, 4])
    backward, other = both.batched(work, [4, 3, 2, 1, 0])
    np.testing.assert_allclose(backward[::-1], forward, rtol=1e-12)
    np.testing.assert_allclose(other.losses[::-1], one.losses, rtol=1e-12)
