"""Adam with decoupled decay, for the parameters that a method leaves to it (arXiv 1412.6980, 1711.05101)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turnout.optim.base import step_count
from turnout.tasks.validation import check_number
from turnout.wire.errors import ConfigError

State = dict[str, Any]


def adam_state(like: Tensor) -> State:
    """Return fresh state: a step count and two moments shaped as ``like``, in its dtype."""
    return {"step": step_count(), "exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like)}


def adam_step(
    params: list[Tensor],
    gradients: list[Tensor],
    states: list[State],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Move ``params`` in place by one step, the operations (hence the bits) of ``torch.optim.Adam``.

    ``gradients`` and moments have the parameters' shapes. Weight decay is the caller's.
    """
    denominators, sizes = adam_moments(gradients, states, lr=lr, betas=betas, eps=eps)
    first = [s["exp_avg"] for s in states]
    if all(p.dtype == m.dtype for p, m in zip(params, first, strict=True)):
        torch._foreach_addcdiv_(params, first, denominators, [-size for size in sizes])
        return
    for p, m, denominator, size in zip(params, first, denominators, sizes, strict=True):
        p.add_((m / denominator).to(p.dtype), alpha=-size)


def adam_moments(
    gradients: list[Tensor],
    states: list[State],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> tuple[list[Tensor], list[float]]:
    """Advance moments and counts; return ``sqrt(v_hat) + eps`` and ``lr / (1 - beta_1^t)`` of each tensor."""
    beta_1, beta_2 = betas
    first, second = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    for s in states:
        s["step"] += 1
    torch._foreach_lerp_(first, gradients, 1 - beta_1)
    torch._foreach_mul_(second, beta_2)
    torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta_2)
    steps = [float(s["step"]) for s in states]
    denominators = list(torch._foreach_sqrt(second))
    torch._foreach_div_(denominators, [(1 - beta_2**t) ** 0.5 for t in steps])
    torch._foreach_add_(denominators, eps)
    return denominators, [lr / (1 - beta_1**t) for t in steps]


def check_betas(field: str, betas: Any) -> None:
    """Raise `ConfigError` unless ``betas`` are two numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ConfigError(f"{field}={betas!r} is not possible; use two numbers, such as (0.9, 0.999).")
    for beta in betas:
        check_number(field, beta, low=0, high=1, open_high=True)
