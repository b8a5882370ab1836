"""LIFT's AdamW (arXiv 2506.00772): epsilon before bias correction, moments that follow the entries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from turnout.peft.adapted import Adapted
from turnout.peft.lift import Lift
from turnout.tasks.validation import check_number


class LiftAdamW(Optimizer):
    """AdamW as LIFT takes its steps: ``w -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)``.

    Decay is decoupled, ``w -= lr weight_decay w`` after the step; of `Lift`'s changes, which pulls the
    weights back to the base. Raises `ConfigError` for numbers out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        check_number("lr", lr, low=0)
        check_number("betas[0]", betas[0], low=0, high=1, open_high=True)
        check_number("betas[1]", betas[1], low=0, high=1, open_high=True)
        check_number("eps", eps, low=0)
        check_number("weight_decay", weight_decay, low=0)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step; return what ``closure`` returned, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, w: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[w]
        if not state:
            state["step"], state["m"], state["v"] = 0, torch.zeros_like(w), torch.zeros_like(w)
        state["step"] += 1
        (b1, b2), t = group["betas"], state["step"]
        m, v = state["m"].mul_(b1).add_(g, alpha=1 - b1), state["v"].mul_(b2).addcmul_(g, g, value=1 - b2)
        size: float = group["lr"] * (1 - b2**t) ** 0.5 / (1 - b1**t)
        w.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"]:
            w.mul_(1 - group["lr"] * group["weight_decay"])


def refresh(adapted: Adapted, optimizer: LiftAdamW | None = None) -> None:
    """Pick all `Lift` layers' entries anew, from the present weights.

    The moments in ``optimizer`` go with entries that stay; those that enter start at 0, the step count goes
    on.
    """
    for name, layer in adapted.layers.items():
        old = cast(Lift, layer).refresh(name)
        state: dict[str, Any] = {}
        if optimizer is not None:
            state = optimizer.state.get(cast(Lift, layer).lift_values, state)
        for moment in {"m", "v"} & set(state):
            state[moment] = torch.where(old >= 0, state[moment][old.clamp(min=0)], 0.0)
