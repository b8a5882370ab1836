"""A federation on data and a model of your own: the wine data of scikit-learn, one cellar a client.

    python examples/own_task.py

A task is three methods (`model`, `client_data`, `loss`); `metrics` and `test_data` have it evaluated.
Registered, it can be named in an experiment file of a program that imports this module.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_wine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from turnout.client import client_app
from turnout.simulation import Bernoulli, LocalGrid
from turnout.strategies import FedAU, FedAvg
from turnout.tasks import ClientData, Task, make_partitioner
from turnout.wire import register


@register("wine", kind="task", summary="178 wines of three cultivars (scikit-learn)")
class Wine(Task):
    """Which of three cultivars a wine is, from 13 measurements."""

    name = "wine"

    def __init__(self, *, num_clients: int = 6, alpha: float = 0.3, seed: int = 0) -> None:
        self.num_clients, self.seed = num_clients, seed
        x, y = load_wine(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(y))
        # Fixed scales: statistics of pooled data would be something that no client knows.
        middle = np.array([13, 2, 2, 20, 100, 2, 2, 0.4, 1.6, 5, 1, 2.6, 750])
        spread = np.array([1, 1, 1, 3, 14, 1, 1, 0.1, 1, 2, 1, 1, 300])
        x = (x - middle) / spread
        self._x, self._y = x[order].astype(np.float32), y[order]
        self._parts = make_partitioner("dirichlet", alpha=alpha).split(self._y[:138], num_clients, seed=seed)

    def model(self) -> nn.Module:
        """Return a perceptron with one hidden layer."""
        return nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 3))

    def client_data(self, client: int) -> ClientData:
        """Return the wines of one cellar."""
        return self._data(self._parts.indices[client])

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return cross_entropy(output, y)

    def metrics(self, output: Tensor, y: Tensor) -> dict[str, float]:
        """Return loss and accuracy."""
        return {
            "loss": float(self.loss(output, y)),
            "accuracy": float((output.argmax(1) == y).float().mean()),
        }

    def test_data(self) -> ClientData:
        """Return 40 wines that no client has."""
        return self._data(np.arange(138, 178))

    def _data(self, rows: np.ndarray) -> ClientData:
        return ClientData(torch.from_numpy(self._x[rows]), torch.from_numpy(self._y[rows]))


def main() -> None:
    """Compare two strategies; half of the cellars answer one request in ten."""
    task = Wine()
    app = client_app(task, lr=0.1, batch_size=16, local_epochs=1)
    for strategy in (FedAvg(weighting="uniform"), FedAU()):
        grid = LocalGrid(app, task.num_clients, participation=Bernoulli([0.9, 0.1] * 3, seed=1))
        result = strategy.start(grid, task.initial_arrays(), num_rounds=100)
        scores = task.evaluate(result.arrays)
        print(f"{type(strategy).__name__:8} accuracy {scores['accuracy']:.3f}  loss {scores['loss']:.3f}")


if __name__ == "__main__":
    main()
