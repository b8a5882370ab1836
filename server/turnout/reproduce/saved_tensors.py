"""What training keeps in memory: bytes saved for the backward pass, and seconds of a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from turnout.peft import AdapterConfig, attach


@dataclass(frozen=True)
class Footprint:
    """One step of training: ``saved_bytes`` of activations that backward needs, ``seconds`` at the least."""

    saved_bytes: int
    seconds: float
    numbers: int


def chain(
    width: int, depth: int, activation: Callable[[], nn.Module], *, trained: bool = False
) -> nn.Sequential:
    """Return ``depth`` linear layers of ``width``, with an activation between each two."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for index in range(depth):
        parts += [nn.Linear(width, width, bias=False), *([activation()] if index + 1 < depth else [])]
    return nn.Sequential(*parts).requires_grad_(trained)


def footprint(module: nn.Module, config: AdapterConfig | None, x: Tensor, repeats: int) -> Footprint:
    """Return what a step of ``module`` with adapters of ``config`` (None: all of its weights trained) takes.

    Bytes are those of distinct storages that autograd keeps, weights left out: they are there anyway.
    """
    if config is not None:
        module = attach(module, config).module
    held = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # Inputs need a gradient: what comes before a layer of a real model is trained too.
    inputs = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module(inputs).square().mean()
    bytes_kept = sum(kept.values())
    loss.backward()
    seconds = min(_timed(module, inputs) for _ in range(repeats))
    return Footprint(bytes_kept, seconds, sum(p.numel() for p in module.parameters() if p.requires_grad))


def _timed(module: nn.Module, inputs: Tensor) -> float:
    started = time.perf_counter()
    module(inputs).square().mean().backward()
    return time.perf_counter() - started
