"""The optimizers of the library, each in several settings, and a small problem to train on."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from turnout.optim import CLASSP, ECOSGD, FRUGAL, AuON, ECOAdamW, HybridAuON, ModuleOptimizer


@dataclass(frozen=True)
class Row:
    """An optimizer with settings with which 40 steps on the problem lower its loss."""

    name: str
    kind: type[ModuleOptimizer]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def of(self, module: nn.Module, **more: Any) -> ModuleOptimizer:
        return self.kind.for_module(module, **{**self.options, **more})


def _frugal(**options: Any) -> dict[str, Any]:
    return {"lr": 0.01, "update_gap": 7, "density": 0.5, **options}


ROWS = [
    Row("auon", AuON, {"lr": 0.1}),
    Row("auon-code", AuON, {"lr": 0.2, "variant": "code", "weight_decay": 0.01}),
    Row("auon-rms", AuON, {"lr": 0.01, "scale": "rms", "nesterov": False}),
    Row("hybrid-auon", HybridAuON, {"lr": 0.05}),
    Row("hybrid-auon-5", HybridAuON, {"lr": 0.05, "ns_steps": 5}),
    Row("classp-1", CLASSP, {"lr": 0.1, "threshold": 1e-7, "count_active": True}),
    Row("classp-2", CLASSP, {"lr": 0.02, "threshold": 1e-7, "power": 2.0, "weight_decay": 0.01}),
    Row("classp-density", CLASSP, {"lr": 0.3, "density": 0.3, "apply_scaling": False}),
    Row("classp-legacy", CLASSP, {"lr": 0.1, "legacy": True, "power": 1.5}),
    Row("eco-sgd", ECOSGD, {"lr": 0.2}),
    Row("eco-sgd-rtn", ECOSGD, {"lr": 0.2, "rounding": "rtn", "quantizer": "int4", "ema": False}),
    Row("eco-sgd-fp8", ECOSGD, {"lr": 0.2, "quantizer": "fp8", "block": 4, "weight_decay": 0.01}),
    Row("eco-adamw", ECOAdamW, {"lr": 0.01, "quantizer": "int4", "weight_decay": 0.01}),
    Row("eco-adamw-grid", ECOAdamW, {"lr": 0.01, "quantizer": 0.02}),
    Row("frugal-block", FRUGAL, _frugal()),
    Row("frugal-block-kept", FRUGAL, _frugal(reset_statistics=False, block_order="descending")),
    Row("frugal-columns", FRUGAL, _frugal(projector="columns", weight_decay=0.01)),
    Row("frugal-rows-sgd", FRUGAL, _frugal(projector="rows", inactive_rule="sgd")),
    Row("frugal-randk-kept", FRUGAL, _frugal(projector="randk", reset_statistics=False)),
    Row("frugal-galore", FRUGAL, _frugal(projector="galore", inactive_rule="no", reset_statistics=False)),
    Row("frugal-galore-random", FRUGAL, _frugal(projector="galore", galore_basis="random")),
    Row("frugal-lion", FRUGAL, _frugal(projector="columns", state_full="lion", lr=0.01)),
    Row("frugal-sgdm", FRUGAL, _frugal(projector="rows", state_full="sgdm")),
]


class Problem:
    """Classify 96 points of 12 numbers by a random linear rule."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(96, 12, generator=generator)
        self.y = (self.x @ torch.randn(12, 4, generator=generator)).argmax(dim=1)

    def module(self) -> nn.Module:
        """Return two hidden layers, their numbers drawn from a seed and no global generator."""
        module = nn.Sequential(
            nn.Linear(12, 16, device="meta"),
            nn.ReLU(),
            nn.Linear(16, 8, device="meta"),
            nn.ReLU(),
            nn.Linear(8, 4, device="meta"),
        ).to_empty(device="cpu")
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 4)
        return module

    def loss(self, module: nn.Module, batch: slice = slice(None)) -> Tensor:
        return nn.functional.cross_entropy(module(self.x[batch]), self.y[batch])

    def train(self, module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        """Take steps on minibatches that the step's number chooses."""
        for step in steps:
            optimizer.zero_grad()
            start = 24 * (step % 4)
            self.loss(module, slice(start, start + 24)).backward()
            optimizer.step()


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def pickled(objects: Any) -> Any:
    """Return a copy that went through pickle."""
    return pickle.loads(pickle.dumps(objects))  # noqa: S301 - Our own bytes.
