"""Training on one task after the other in one place: field space, and what it is compared with."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from turnout.optim import FieldOptimizer, annealed, field_groups, set_noise, set_temperature
from turnout.optim.binary_fields import signs
from turnout.tasks import Permuted

EWC: Final = (30.0, 300.0)
_BATCH: Final = 64


def sequence_of_tasks(
    task: Permuted,
    *,
    epochs: int,
    seed: int,
    net: str = "field",
    lr: float = 0.01,
    beta: float | None = None,
    scale: float = 1.0,
    kl_weight: float = 0.0,
    prior: Any = "task",
    natural: bool = False,
    optimizer: str = "adam",
    metaplasticity: float = 0.0,
    ewc: float = 0.0,
) -> dict[str, float]:
    """Train on the tasks in order and return the accuracies at the end.

    ``beta`` None anneals the temperature over the whole sequence; rates of ordinary networks decay linearly.
    """
    model = task.seeded_model(seed)
    data = task.client_data(0)
    rng = np.random.default_rng([seed, 9])
    steps_per_epoch = -(-len(data) // _BATCH)
    total = task.num_tasks * epochs
    if net == "field":
        learner: Any = _Fields(model, lr, beta, scale, kl_weight / len(data), prior, natural, total, seed)
    elif net == "straight-through":
        learner = _StraightThrough(model, lr, metaplasticity, total * steps_per_epoch)
    else:
        learner = _Ordinary(model, optimizer, lr, ewc, total * steps_per_epoch)
    for number in range(task.num_tasks):
        x = task.shuffled(data.x, number)
        learner.begin_task()
        for epoch in range(epochs):
            learner.begin_epoch(number * epochs + epoch)
            order = torch.from_numpy(rng.permutation(len(data)))
            for start in range(0, len(data), _BATCH):
                rows = order[start : start + _BATCH]
                learner.step(x[rows], data.y[rows])
        learner.end_task(x, data.y)
    binary = task.evaluate_tasks(model, "binary")
    found = task.evaluate_tasks(model, "mean-field") if net == "field" else dict(binary)
    del found["loss"]
    return found if net == "float" else {**found, "binary": binary["accuracy"]}


class _Learner:
    def begin_task(self) -> None:
        """Nothing by default."""

    def begin_epoch(self, epoch: int) -> None:
        """Nothing by default."""

    def end_task(self, x: Tensor, y: Tensor) -> None:
        """Nothing by default."""


class _Fields(_Learner):
    """Field space, as in the paper's code: Adam's moments go on, the temperature changes by epoch."""

    def __init__(
        self, model: nn.Module, lr: float, beta: float | None, scale: float, kl: float, prior: Any, natural:
        bool, total: int, seed: int,
    ) -> None:  # fmt: skip
        self.model, self.beta, self.total = model, beta, total
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(scale)
        set_noise(model, torch.Generator().manual_seed(seed))
        self.optimizer = FieldOptimizer(
            field_groups(model), lr=lr, kl_weight=kl, prior=prior, natural=natural
        )

    def begin_task(self) -> None:
        if self.optimizer.param_groups[0]["prior"] == "task":
            self.optimizer.new_task()

    def begin_epoch(self, epoch: int) -> None:
        beta = annealed(epoch, self.total) if self.beta is None else self.beta
        set_temperature(self.model, beta)
        self.optimizer.set_temperature(beta)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(self.model(x), y))
        self.optimizer.step()


class _StraightThrough(_Learner):
    """Binary weights with straight-through gradients on latent ones; metaplastic: large ones move back less.

    Metaplasticity (Laborieux et al., 2021): a step towards zero is scaled by ``1 - tanh(m w)^2``.
    """

    def __init__(self, model: nn.Module, lr: float, m: float, total: int) -> None:
        self.latent, self.m = model, m
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.1)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.decay = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: 1 - t / (total + 1))

    def step(self, x: Tensor, y: Tensor) -> None:
        weights: list[Tensor] = list(self.latent.parameters())
        before = [w.detach().clone() for w in weights]
        self.optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(_binary_network(x, weights), y))
        self.optimizer.step()
        if self.m:
            with torch.no_grad():
                for w, old in zip(weights, before, strict=True):
                    change = w - old
                    held = old + change * (1 - torch.tanh(self.m * old).square())
                    w.copy_(torch.where(change * old < 0, held, w))
        self.decay.step()


def _binary_network(x: Tensor, latent: list[Tensor]) -> Tensor:
    """Return the outputs under the signs of ``latent``; gradients pass as if there were no signs."""
    x = x.flatten(1)
    for number, w in enumerate(latent):
        x = x if number == 0 else x.relu()
        x = x @ (w + (signs(w) - w).detach()).T / w.shape[1] ** 0.5
    return x


class _Ordinary(_Learner):
    """An ordinary network; with EWC, quadratic penalties with the diagonal Fisher of each finished task."""

    def __init__(self, model: nn.Module, optimizer: str, lr: float, ewc: float, total: int) -> None:
        self.model, self.ewc = model, ewc
        kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
        extra = {"momentum": 0.9} if optimizer == "sgd" else {}
        self.optimizer = kinds[optimizer](model.parameters(), lr=lr, **extra)
        self.decay = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: 1 - t / (total + 1))
        self.penalties: list[tuple[list[Tensor], list[Tensor]]] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(x), y)
        for centre, fisher in self.penalties:
            for p, c, f in zip(self.model.parameters(), centre, fisher, strict=True):
                loss = loss + 0.5 * self.ewc * (f * (p - c).square()).sum()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.decay.step()

    def end_task(self, x: Tensor, y: Tensor) -> None:
        if not self.ewc:
            return
        fisher = [torch.zeros_like(p) for p in self.model.parameters()]
        for start in range(300):
            gradients = torch.autograd.grad(
                cross_entropy(self.model(x[start : start + 1]), y[start : start + 1]),
                list(self.model.parameters()),
            )
            for total, gradient in zip(fisher, gradients, strict=True):
                total += gradient.square() / 300
        self.penalties.append(([p.detach().clone() for p in self.model.parameters()], fisher))
