"""An allocator beside an ordinary training loop, where no server decides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, cast

from torch import nn

from turnout.allocation import Allocator, ModelView
from turnout.peft.attach import Adapted
from turnout.tasks.training_part import TrainingPart
from turnout.tasks.travelling import travelling
from turnout.wire.errors import ConfigError


class _Allocated(Protocol):
    def allocator(self, local_steps: int = 1) -> Allocator: ...


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
    if not hasattr(adapted.config, "allocator"):
        raise ConfigError(
            f"{type(adapted.config).__name__} has nothing to allocate; do not call this for it."
        )
    allocator = cast(_Allocated, adapted.config).allocator(1)
    for part in scored_parts(adapted):
        if step == 1:
            part.start_training(step, (0,))
        part.after_gradient()
        cast(_Scored, part).report()
    tensors = travelling(adapted.module)
    shared = adapted.allocation_state()
    model = ModelView(
        {name: tensor.detach().numpy() for name, tensor in tensors.items() if name not in shared},
        {name: shared[name].numpy().copy() for name in shared if name in tensors},
    )
    allocator.allocate(step, model)
    decided = {name: value for name, value in model.buffers.items() if allocator.decides(name)}
    for name, value in decided.items():
        shared[name].copy_(shared[name].new_tensor(value))
