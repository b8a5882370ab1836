"""The federated halves of BO-REP's study: hyper-cleaning and hyper-representation through the strategies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor
from torch.nn.functional import cross_entropy

from turnout.client import client_app
from turnout.client.state import ClientState
from turnout.optim import BORep as Trainer
from turnout.simulation import LocalGrid
from turnout.strategies import BORep, BORepLocalUpper, StreamingStrategy
from turnout.tasks import HyperCleaning, HyperRepresentation, Task
from turnout.wire import NDArray
from turnout.wire.record_tree import decode_records

CLEANING: Final[dict[str, tuple[float, ...]]] = {
    "BO-REP": (0.3, 1.0),
    "one pool, momentum SGD": (30.0, 100.0),
    "uniform weights": (0.0,),
    "oracle weights": (0.0,),
    "clean examples alone": (0.0,),
}
REPRESENTATION: Final[dict[str, tuple[float, ...]]] = {
    "BO-REP": (0.3, 1.0, 3.0),
    "momentum SGD": (3.0, 10.0, 30.0),
    "momentum, clipped": (10.0, 30.0),
    "first order": (0.3, 1.0, 3.0),
}
EVERY: Final = 10


def cleaning(method: str, eta: float, rounds: int, seed: int) -> Mapping[str, NDArray]:
    """Return accuracy over the rounds and the mean weights of wrong and right labels at the end."""
    task = HyperCleaning(num_clients=5, seed=seed)
    if method == "BO-REP":
        return _cleaning_federated(task, eta, rounds)
    if method == "one pool, momentum SGD":
        return _cleaning_pooled(task, eta, rounds)
    pool = Pool(task)
    x, y, weights = pool.x, pool.y, torch.full((len(pool.y),), 0.5)
    if method == "oracle weights":
        weights = (~pool.wrong).float()
    elif method == "clean examples alone":
        x, y, weights = pool.clean_x, pool.clean_y, torch.ones(len(pool.clean_y))
    accuracy = pool.accuracy(solve(x, y, weights, task.lam))
    if method == "clean examples alone":
        weights = torch.zeros(len(pool.y))
    return _figures([0], [accuracy], pool.mean_weights(weights))


def _cleaning_federated(task: HyperCleaning, eta: float, rounds: int) -> Mapping[str, NDArray]:
    grid = LocalGrid(client_app(task, batch_size=10_000), task.num_clients)
    strategy = BORepLocalUpper(eta=eta, lower_lr=1.0, nu=1.0, inner_steps=10, init_steps=100)
    at, found = _evaluated(strategy, grid, task, rounds)
    kept = grid.state_dict()["clients"]
    pool, weights = Pool(task), []
    for client in range(task.num_clients):
        state = ClientState(decode_records(kept[str(client)]), "bo-rep-local-upper", rounds + 1)
        weights.append(torch.tensor(state.load(task.num_examples(client))["x"]).sigmoid())
    return _figures(at, [m["accuracy"] for m in found], pool.mean_weights(torch.cat(weights)))


def _cleaning_pooled(task: HyperCleaning, eta: float, rounds: int) -> Mapping[str, NDArray]:
    pool = Pool(task)
    model = task.seeded_model(task.seed)
    logits = torch.zeros(len(pool.y), requires_grad=True)
    groups: list[dict[str, Any]] = [
        {"params": [logits], "role": "upper"},
        {"params": list(model.parameters()), "role": "lower"},
    ]
    trainer = Trainer(
        groups, lr=eta, lower_lr=1.0, nu=1.0, inner_steps=10, init_steps=100, normalize=False
    )  # fmt: skip
    rows = torch.arange(len(pool.y))
    at, accuracies = [0], [pool.accuracy(model)]
    steps = rounds * 2 // 3  # Of three federated rounds, two step x.
    for t in range(1, steps + 1):
        trainer.step(
            lambda: task.upper_loss(model, [logits], (pool.clean_x, pool.clean_y)),
            lambda: task.lower_loss(model, [logits], (pool.x, pool.y), rows),
        )
        if t % EVERY == 0 or t == steps:
            at.append(t * rounds // steps)
            accuracies.append(pool.accuracy(model))
    return _figures(at, accuracies, pool.mean_weights(logits.detach().sigmoid()))


class Pool:
    """All clients' examples of a cleaning task together, in the clients' order."""

    def __init__(self, task: HyperCleaning) -> None:
        clients = range(task.num_clients)
        self.task = task
        self.x = torch.cat([task.client_data(c).x for c in clients])
        self.y = torch.cat([task.client_data(c).y for c in clients])
        self.clean_x = torch.cat([task.upper_data(c).x for c in clients])
        self.clean_y = torch.cat([task.upper_data(c).y for c in clients])
        self.wrong = torch.from_numpy(np.concatenate([task.wrong(c) for c in clients]))

    def accuracy(self, model: torch.nn.Module) -> float:
        """Return the accuracy on the test examples."""
        return self.task.evaluate_model(model, self.task.test_data())["accuracy"]

    def mean_weights(self, weights: Tensor) -> tuple[float, float]:
        """Return the mean weight of wrong and of right labels."""
        return float(weights[self.wrong].mean()), float(weights[~self.wrong].mean())


def solve(x: Tensor, y: Tensor, weights: Tensor, lam: float) -> torch.nn.Module:
    """Return softmax regression that minimises the weighted cross-entropy plus ``lam/2 ||y||^2``."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(x[0].numel(), 10))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    solver = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        losses = cross_entropy(model(x), y, reduction="none")
        penalty = sum((p.square().sum() for p in model.parameters()), start=losses.new_zeros(()))
        loss = (weights * losses).mean() + 0.5 * lam * penalty
        torch.autograd.backward(loss)
        return loss

    cast(Any, solver).step(closure)
    return model


def representation(method: str, eta: float, rounds: int, seed: int) -> Mapping[str, NDArray]:
    """Return accuracy and loss of fitted heads over the rounds."""
    task = HyperRepresentation(num_clients=5, seed=seed)
    grid = LocalGrid(client_app(task, batch_size=64, seed=seed), task.num_clients)
    settings: dict[str, dict[str, Any]] = {
        "BO-REP": {},
        "momentum SGD": {"normalize": False},
        "momentum, clipped": {"normalize": False, "clip": 0.1},
        "first order": {"nu": 0.0},
    }
    options = {"nu": 0.1, "lower_lr": 0.5, "inner_steps": 5, "init_steps": 50, **settings[method]}
    strategy = BORep(eta=eta, decay="sqrt", **options)
    at, found = _evaluated(strategy, grid, task, rounds)
    return {
        "rounds": np.array(at),
        "accuracy": np.array([m["accuracy"] for m in found]),
        "loss": np.array([m["loss"] for m in found]),
    }


def _evaluated(
    strategy: StreamingStrategy, grid: LocalGrid, task: Task, rounds: int
) -> tuple[list[int], list[dict[str, float]]]:
    """Run and return the rounds at which the model was evaluated, with the metrics."""
    at: list[int] = []
    found: list[dict[str, float]] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> None:
        if server_round % EVERY == 0 or server_round == rounds:
            at.append(server_round)
            found.append(task.evaluate(arrays))

    run: Callable[..., Any] = strategy.start
    run(grid, task.initial_arrays(), num_rounds=rounds, evaluate_fn=evaluate)
    return at, found


def _figures(at: list[int], accuracies: list[float], weights: tuple[float, float]) -> Mapping[str, NDArray]:
    return {
        "rounds": np.array(at),
        "accuracy": np.array(accuracies),
        "weight-wrong": np.array([weights[0]]),
        "weight-right": np.array([weights[1]]),
    }
