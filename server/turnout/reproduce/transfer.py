"""What the adapters' studies share: a small network trained on upright digits, adapted to rotated ones.

64-w-w-10 with ReLU. Adapters go on the two hidden layers, the last layer is frozen; AdamW (betas 0.9 and
0.999).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from turnout.peft import AdapterConfig, LoraConfig, attach
from turnout.tasks.classification import Examples, split_examples
from turnout.tasks.digits import load_digits

HIDDEN: Final = ("0", "2")
BATCH: Final = 64
_SOURCE_STEPS: Final = 600


@dataclass(frozen=True)
class Digits:
    """Digits as tensors: pixels (n, 64) from 0 to 1, labels (n,)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Method:
    """What is compared: adapters of ``config``, or (None) full fine-tuning of the hidden layers.

    ``prepare`` may change the network before adapters are attached and after.
    """

    name: str
    config: AdapterConfig | None
    prepare: Callable[[nn.Sequential, AdapterConfig], nn.Module] | None = None


@dataclass(frozen=True)
class Job:
    """One training: a method at a learning rate, for one seed."""

    method: Method
    rate: float
    seed: int
    width: int
    steps: int
    train_examples: int | None = None


@dataclass
class Adaptation:
    """How it went; ``losses`` are over the whole training set at `LOSS_AT` steps and at the end."""

    numbers: int
    losses: list[float] = field(default_factory=list)
    target: float = 0.0
    source: float = 0.0


LOSS_AT: Final = (50,)


def adapt(job: Job) -> Adaptation:
    """Return how ``job`` went."""
    train, test, source_test = digits(job.seed, job.train_examples)
    network = pretrained(job.width, job.seed)
    module, trained = _prepared(network, job.method)
    optimizer = torch.optim.AdamW(trained, lr=job.rate, weight_decay=0.0)
    rng = np.random.default_rng([job.seed, 5])
    outcome = Adaptation(sum(p.numel() for p in trained))
    for step in range(1, job.steps + 1):
        rows = torch.from_numpy(rng.integers(len(train.y), size=BATCH))
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(module(train.x[rows]), train.y[rows]))
        optimizer.step()
        if step in LOSS_AT or step == job.steps:
            with torch.no_grad():
                outcome.losses.append(float(cross_entropy(module(train.x), train.y)))
    outcome.target, outcome.source = accuracy(module, test), accuracy(module, source_test)
    return outcome


def _prepared(network: nn.Sequential, method: Method) -> tuple[nn.Module, list[nn.Parameter]]:
    if method.config is None:
        network.requires_grad_(False)
        for name in HIDDEN:
            network.get_submodule(name).requires_grad_(True)
        return network, [p for p in network.parameters() if p.requires_grad]
    if method.prepare is not None:
        module = method.prepare(network, method.config)
    else:
        module = attach(network, method.config).module
    return module, [p for p in module.parameters() if p.requires_grad]


def with_pissa(network: nn.Sequential, config: AdapterConfig) -> nn.Module:
    """Return ``network`` with LoRA factors at the principal part of each weight, the base at the rest.

    PiSSA (arXiv 2404.02948), a baseline: the network's function does not change.
    """
    assert isinstance(config, LoraConfig)
    adapted = attach(network, config)
    for layer in adapted.layers.values():
        with torch.no_grad():
            u, s, vh = torch.linalg.svd(layer.weight, full_matrices=False)
            root = s[: config.r].sqrt()
            a, b = root[:, None] * vh[: config.r], u[:, : config.r] * root
            layer.base_weight.sub_(b @ a)
            layer.lora_A.copy_(a)  # type: ignore[operator]
            layer.lora_B.copy_(b / config.scale)  # type: ignore[operator]
    return adapted.module


@lru_cache(maxsize=16)
def digits(seed: int, train_examples: int | None) -> tuple[Digits, Digits, Digits]:
    """Return rotated training and test digits, and upright test digits."""
    train, test = split_examples(load_digits(), 0.2, seed)
    rotated = _tensors(train, turn=True)
    if train_examples is not None:
        rotated = Digits(rotated.x[:train_examples], rotated.y[:train_examples])
    return rotated, _tensors(test, turn=True), _tensors(test, turn=False)


def pretrained(width: int, seed: int) -> nn.Sequential:
    """Return a new copy of the network that was trained on upright digits."""
    network = _network(width, seed)
    network.load_state_dict(_source_state(width, seed))
    return network


def accuracy(module: nn.Module, data: Digits) -> float:
    """Return the share of right answers."""
    with torch.no_grad():
        return float((module(data.x).argmax(1) == data.y).double().mean())


@lru_cache(maxsize=16)
def _source_state(width: int, seed: int) -> dict[str, Tensor]:
    train, _ = split_examples(load_digits(), 0.2, seed)
    data, network = _tensors(train, turn=False), _network(width, seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    rng = np.random.default_rng([seed, 4])
    for _ in range(_SOURCE_STEPS):
        rows = torch.from_numpy(rng.integers(len(data.y), size=BATCH))
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(network(data.x[rows]), data.y[rows]))
        optimizer.step()
    return network.state_dict()


def _network(width: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )


def _tensors(examples: Examples, *, turn: bool) -> Digits:
    images = np.rot90(examples.x, axes=(1, 2)) if turn else examples.x
    pixels = np.ascontiguousarray(images, np.float32).reshape(len(examples.labels), 64) / 16.0
    return Digits(torch.from_numpy(pixels), torch.from_numpy(examples.labels))
