"""An allocator beside an ordinary training loop, where no server decides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol, cast

import torch
from torch import nn

from turnout.allocation import AdaLoraAllocator, Allocator, ModelView
from turnout.peft.adapted import Adapted
from turnout.tasks.training_part import TrainingPart
from turnout.wire.errors import ConfigError


class _Scored(Protocol):
    def report(self) -> None: ...


def scored_parts(adapted: Adapted) -> Iterable[TrainingPart]:
    """Return the modules of ``adapted`` that collect scores."""
    parts: Iterable[nn.Module] = adapted.module.modules()
    return (part for part in parts if isinstance(part, TrainingPart) and hasattr(part, "report"))


def update_and_allocate(adapted: Adapted, step: int) -> None:
    """Take the gradients of a step into the scores and allocate anew, as HF's method of that name.

    To be called after ``optimizer.step()`` and before ``zero_grad()``, with steps counted from 1. The model
    must be on the CPU. Raises `ConfigError` for adapters that allocate nothing.
    """
    for part in scored_parts(adapted):
        if step == 1:
            part.start_training(step, (0,))
        part.after_gradient()
        cast(_Scored, part).report()
    allocate(adapted, step)


def allocate(adapted: Adapted, step: int) -> None:
    """Allocate by the scores as they are; see `update_and_allocate`."""
    allocator: Allocator | None = adapted.config.allocator(1)
    if allocator is None:
        raise ConfigError(
            f"{type(adapted.config).__name__} has nothing to allocate; do not call this for it."
        )
    if isinstance(allocator, AdaLoraAllocator):
        allocator = replace(allocator, largest=False)  # There is no server that would decompose.
    buffers = adapted.allocation_state()
    model = ModelView(
        {name: tensor.numpy() for name, tensor in adapted.trainable_state_dict().items()},
        {name: tensor.numpy().copy() for name, tensor in buffers.items()},
    )
    allocator.allocate(step, model)
    for name, tensor in buffers.items():
        if allocator.decides(name):
            tensor.copy_(torch.from_numpy(model.buffers[name]))
