"""What a federation learns: a model, each client's data, a loss and a metric."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from flwr.app import ArrayRecord

from turnout.wire.arrays import NDArray, view
from turnout.wire.errors import ConfigError

if TYPE_CHECKING:  # A server whose clients bring an app of their own has no PyTorch.
    from torch import Tensor, nn

Vector = NDArray

# Building a module draws from torch's global generator; every build in Turnout goes through this lock, so
# that a seeded build in one thread cannot be disturbed by a build in another.
building: Final = threading.RLock()
# A forked process must not wait for a thread that it does not have.
os.register_at_fork(
    before=building.acquire, after_in_parent=building.release, after_in_child=building.release
)


@dataclass(frozen=True, slots=True)
class ClientData:
    """Examples of one client: ``x`` and ``y`` share their first dimension, the number of examples."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return int(self.y.shape[0])


class AdmmSolver(Protocol):
    """Exact proximal steps on one client's objective f_k (arXiv 2409.13451: A_k, b_k, N_k)."""

    def solve(self, v: Vector) -> Vector:
        """Return ``N_k (b_k + v)``: the minimiser of ``f_k(w) - <v, w> + rho/2 ||w||^2``."""

    def step(self, w: Vector, s: Vector) -> Vector:
        """Return ``(I - rho N_k) w + rho N_k s``: the ADMM step with the dual eliminated."""


class Task(ABC):
    """A learning problem spread over ``num_clients`` clients.

    Subclass it with `model`, `client_data` and `loss` to bring your own problem; override `metrics` and
    `test_data` to have it evaluated. Models must not draw from torch's global generator while they train
    (dropout does), or clients that run in parallel threads would not be reproducible.

    num_clients
        Number of clients.
    seed
        Seeds the data's split and the initial model; the run's seed unless it is given.
    chunk_size
        Examples that go through the model at once where a whole set does: bounds the memory.
    """

    name: str
    num_clients: int
    seed: int = 0
    chunk_size: int = 2048
    target_modules: tuple[str, ...] | None = None
    """Layers that adapters are put on unless their configuration says otherwise; None: every linear one."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules that train whole beside adapters unless their configuration says otherwise: a new head."""

    @abstractmethod
    def model(self) -> nn.Module:
        """Return a new model; its parameters are drawn by torch's usual initialisation."""

    @abstractmethod
    def client_data(self, client: int) -> ClientData:
        """Return the training examples of ``client`` (from 0), the same tensors each time."""

    @abstractmethod
    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss over a batch of model outputs and targets, a scalar tensor."""

    def metrics(self, output: Tensor, y: Tensor) -> dict[str, float]:
        """Return metrics that are means over the given examples; ``"loss"`` is always one of them."""
        return {"loss": float(self.loss(output, y))}

    def test_data(self) -> ClientData | None:
        """Return the server's held-out examples, or None when the task has none."""
        return None

    def examples_at(self, data: ClientData, server_round: int) -> ClientData:
        """Return what of a client's examples ``data`` it trains on in ``server_round``. Default: all.

        For sequences of tasks; the number of examples stays the same.
        """
        return data

    def num_examples(self, client: int) -> int:
        """Return the number of training examples of ``client``."""
        return len(self.client_data(client))

    def label_distribution(self) -> Vector:
        """Return each client's share of labels, shape (num_clients, classes); zeros for one without data.

        Raises `ConfigError` for a task without class labels.
        """
        raise ConfigError(
            f"task {self.name!r} has no class labels, so nothing can be correlated with them; "
            "give participation probabilities or use two groups."
        )

    def admm_solver(self, client: int, rho: float) -> AdmmSolver | None:
        """Return the closed-form proximal steps of ``client``'s objective, or None when there are none."""
        return None

    def seeded_model(self, seed: int) -> nn.Module:
        """Return `model` built under ``seed``; torch's global generator is left as it was."""
        import torch

        with building, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.model()

    def initial_arrays(self) -> ArrayRecord:
        """Return the initial model of a run, drawn from the task's ``seed``: of it, what travels.

        Raises `LayoutError` for a model that no client could train.
        """
        from turnout.tasks.travelling import record_of

        return record_of(self.seeded_model(self.seed))[0]

    def evaluate(self, arrays: ArrayRecord) -> dict[str, float]:
        """Return `metrics` of the model ``arrays`` on `test_data`; empty when the task has no test data."""
        data = self.test_data()
        if data is None:
            return {}
        return self.evaluate_model(self.loaded_model(arrays), data)

    def loaded_model(self, arrays: ArrayRecord) -> nn.Module:
        """Return the model whose travelling tensors are ``arrays``."""
        import torch

        from turnout.tasks.travelling import travelling

        model = self.seeded_model(self.seed)
        with torch.no_grad():
            for name, tensor in travelling(model).items():
                tensor.copy_(torch.tensor(view(arrays[name])))
        return model

    def evaluate_model(self, model: nn.Module, data: ClientData) -> dict[str, float]:
        """Return `metrics` of ``model`` in evaluation mode on ``data``, in chunks that bound the memory."""
        import torch

        totals: dict[str, float] = {}
        training = model.training
        model.eval()
        with torch.no_grad():
            for start in range(0, len(data), self.chunk_size):
                x, y = data.x[start : start + self.chunk_size], data.y[start : start + self.chunk_size]
                for name, value in self.metrics(model(x), y).items():
                    totals[name] = totals.get(name, 0.0) + value * (len(y) / len(data))
        model.train(training)
        return totals
