"""Losses that are known by name, so that a trainer may compute them in its own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal, TypeVar

from turnout.tasks.task import Task

LossName = Literal["cross-entropy", "mean-squared-error"]
F = TypeVar("F", bound=Callable[..., Any])

_NAMES: Final[dict[Any, LossName]] = {}


def known_loss(name: LossName) -> Callable[[F], F]:
    """Declare that the decorated `Task.loss` is ``torch.nn.functional``'s loss ``name`` with its defaults.

    It holds for that very function: a subclass that overrides `Task.loss`, a wrapper around it or an instance
    with a loss of its own has an unknown loss unless it is declared as well.
    """

    def declare(function: F) -> F:
        _NAMES[function] = name
        return function

    return declare


def loss_name(task: Task) -> LossName | None:
    """Return the name of the task's loss, None when it is not a known one."""
    bound = task.loss  # What is called in training, wherever it comes from.
    if getattr(bound, "__self__", None) is not task:
        return None
    return _NAMES.get(getattr(bound, "__func__", None))
