"""The rules with state that FRUGAL gives the active part: Adam, Lion (arXiv 2302.06675), momentum SGD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from turnout.optim.adam import State, adam_step
from turnout.optim.base import Group, step_count

RULES: Final[Mapping[str, tuple[str, ...]]] = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "sgdm": ("exp_avg",),
}
"""The rules, and the moments that each keeps."""


def fresh_state(rule: str, like: Tensor) -> dict[str, Any]:
    """Return a step count and zero moments shaped as ``like``."""
    return {"step": step_count(), **{key: torch.zeros_like(like) for key in RULES[rule]}}


def state_full_step(
    group: Group, targets: list[Tensor], gradients: list[Tensor], states: list[State], lr: float
) -> None:
    """Move ``targets`` in place by one step of the group's rule; all lists are of tensors of equal shapes."""
    rule = group["state_full"]
    if rule == "adam":
        adam_step(targets, gradients, states, lr=lr, betas=group["betas"], eps=group["eps"])
        return
    beta_1, beta_2 = group["betas"]
    moments = [state["exp_avg"] for state in states]
    for state in states:
        state["step"] += 1
    steps: Sequence[Tensor] = moments
    if rule == "lion":
        steps = torch._foreach_lerp(moments, gradients, 1 - beta_1)
        torch._foreach_sign_(steps)
        torch._foreach_lerp_(moments, gradients, 1 - beta_2)
    else:
        torch._foreach_mul_(moments, beta_1)
        torch._foreach_add_(moments, gradients)
    for target, step in zip(targets, steps, strict=True):
        target.add_(step.to(target.dtype), alpha=-lr)
