"""What the optimizers' studies share: handwritten digits, a perceptron, and one training run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor, nn

from turnout.tasks.classification import Examples
from turnout.tasks.digits import load_digits
from turnout.wire import NDArray
from turnout.wire.torch_threads import one_torch_thread

TRAIN: Final = 1300
MakeOptimizer = Callable[[nn.Module, float], Sequence[torch.optim.Optimizer]]


@dataclass(frozen=True)
class DigitImages:
    """The digits in a seeded order: inputs (n, 64) in [0, 1], labels (n,); the first 1,300 train."""

    x: Tensor
    y: Tensor

    @classmethod
    def shuffled(cls, seed: int) -> DigitImages:
        """Return the digits in the order of ``seed``."""
        raw = _raw()
        order = torch.randperm(len(raw.labels), generator=torch.Generator().manual_seed(seed))
        x = torch.from_numpy(raw.x.reshape(len(raw.labels), -1)).float() / 16.0
        return cls(x[order], torch.from_numpy(raw.labels).long()[order])

    def permuted(self, seed: int) -> DigitImages:
        """Return the same images with their pixels in another order: another task."""
        pixels = torch.randperm(self.x.shape[1], generator=torch.Generator().manual_seed(1000 + seed))
        return DigitImages(self.x[:, pixels], self.y)

    def batches(self, steps: int, size: int, seed: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield minibatches of the training part, epoch by epoch."""
        generator, given = torch.Generator().manual_seed(seed), 0
        while given < steps:
            order = torch.randperm(TRAIN, generator=generator)
            for start in range(0, TRAIN - size + 1, size):
                if given == steps:
                    return
                rows = order[start : start + size]
                given += 1
                yield self.x[rows], self.y[rows]

    def train_loss(self, module: nn.Module) -> float:
        """Return the mean loss on the training part."""
        with torch.no_grad():
            return float(nn.functional.cross_entropy(module(self.x[:TRAIN]), self.y[:TRAIN]))

    def accuracy(self, module: nn.Module) -> float:
        """Return the share of the test part that is classified right."""
        with torch.no_grad():
            return float((module(self.x[TRAIN:]).argmax(dim=1) == self.y[TRAIN:]).float().mean())


@lru_cache(maxsize=1)
def _raw() -> Examples:
    """Return the digits, read once."""
    return load_digits()


def perceptron(widths: Sequence[int], seed: int) -> nn.Module:
    """Return linear layers with ReLU between, drawn from ``seed`` as He et al. do, biases zero."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layer = nn.Linear(wide, narrow, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            layer.weight.copy_(torch.randn(narrow, wide, generator=generator) * (2.0 / wide) ** 0.5)
            layer.bias.zero_()
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Trained:
    """How a run ended: the loss on all training images, test accuracy, and the minibatch losses."""

    loss: float
    accuracy: float
    curve: list[float]


def train(
    make: MakeOptimizer,
    lr: float,
    *,
    widths: Sequence[int],
    steps: int,
    batch: int,
    seed: int,
    schedule: Callable[[float], float] | None = None,
) -> Trained:
    """Train a perceptron on the digits; ``schedule`` maps the share done to a factor of the rates."""
    with one_torch_thread():
        digits, module = DigitImages.shuffled(seed), perceptron(widths, seed)
        optimizers = make(module, lr)
        rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
        curve = []
        for step, (x, y) in enumerate(digits.batches(steps, batch, seed)):
            if schedule is not None:
                for optimizer, own in zip(optimizers, rates, strict=True):
                    for group, rate in zip(optimizer.param_groups, own, strict=True):
                        group["lr"] = rate * schedule(step / steps)
            curve.append(take_step(optimizers, lambda x=x, y=y: nn.functional.cross_entropy(module(x), y)))  # type: ignore[misc]
        return Trained(digits.train_loss(module), digits.accuracy(module), curve)


def take_step(optimizers: Sequence[torch.optim.Optimizer], loss_of: Callable[[], Tensor]) -> float:
    """Take one step with each optimizer on the same gradients; return the loss before."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = loss_of()
    torch.autograd.backward(loss)
    for optimizer in optimizers:
        optimizer.step()
    return float(loss.detach())


def mean(values: Iterable[float]) -> float:
    """Return the mean of a few numbers."""
    listed = list(values)
    return sum(listed) / len(listed)


def best(results: Mapping[Any, float]) -> Any:
    """Return the key of the lowest number; what is not finite is worst."""
    return min(results, key=lambda key: results[key] if results[key] == results[key] else float("inf"))


def vector(values: Tensor) -> NDArray:
    """Return a tensor as a NumPy array."""
    array: NDArray = values.detach().numpy()
    return array
