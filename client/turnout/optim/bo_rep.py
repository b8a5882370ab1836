"""BO-REP: bilevel optimisation when the upper gradient grows with its own norm (arXiv 2401.09587).

Normalised momentum on the upper variables, a refined start of the lower ones, and lower steps only every
``interval`` iterations. Order of one iteration, as in the authors' code: y (when it is due), z, h, m, x.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from turnout.optim.bilevel import Loss, descend_lower, hypergradient, joint_norm, refine_lower
from turnout.tasks.validation import check_count, check_number
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register

_ROLES = ("upper", "lower")


@register("bo-rep", kind="bilevel-trainer", paper="2401.09587")
class BORep(torch.optim.Optimizer):
    """Bilevel trainer (arXiv 2401.09587): ``min_x f(x, y*(x))`` with ``y*(x) = argmin_y g(x, y)``.

    ``params`` are two groups, ``{"params": x, "role": "upper"}`` and ``{"params": y, "role": "lower"}``. g
    must be strongly convex in y: put its weight decay inside g, never on the optimizer. Sparse gradients and
    cuDNN RNNs have no double backward and cannot be lower variables.

    lr
        eta: the exact length of every step of x; decay it with a torch scheduler, or x circles at a radius of
        about ``eta / (1 - beta)``.
    lower_lr
        alpha: step of y.
    nu
        Step of z, below ``2 / lambda_max`` of the lower Hessian, or z diverges: watch `residual`.
    beta
        Momentum of x.
    interval, inner_steps
        y takes ``inner_steps`` steps every ``interval`` iterations.
    init_steps
        Steps that refine y before the first iteration; 0 leaves that to the first refresh.
    radius
        Radius of the ball in which lower steps stay; None is no ball.
    weight_decay
        Decoupled, on x only.
    normalize
        False is plain momentum (with ``interval = inner_steps = 1``: SOBA with momentum), for comparison;
        ``clip`` then bounds the length of the momentum that is stepped along.
    """

    residual: float = 0.0
    """Norm of ``d2_yy g z - d_y f`` in the last step: it must not grow."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float = 1e-2,
        lower_lr: float = 1e-3,
        nu: float = 1e-2,
        beta: float = 0.9,
        interval: int = 2,
        inner_steps: int = 3,
        init_steps: int = 0,
        radius: float | None = None,
        weight_decay: float = 0.0,
        normalize: bool = True,
        clip: float | None = None,
        eps: float = 1e-12,
    ) -> None:
        for field, value in (("lr", lr), ("lower_lr", lower_lr)):
            check_number(field, value, low=0, open_low=True)
        for field, value in (("nu", nu), ("weight_decay", weight_decay), ("eps", eps)):
            check_number(field, value, low=0)
        check_number("beta", beta, low=0, high=1, open_high=True)
        for field, count, low in (
            ("interval", interval, 1),
            ("inner_steps", inner_steps, 0),
            ("init_steps", init_steps, 0),
        ):
            check_count(field, count, low=low)
        for field, bound in (("radius", radius), ("clip", clip)):
            if bound is not None:
                check_number(field, bound, low=0, open_low=True)
        if clip is not None and normalize:
            raise ConfigError(f"clip={clip!r} has no effect on normalised steps; set normalize=False.")
        defaults = {
            "lr": lr, "lower_lr": lower_lr, "nu": nu, "beta": beta, "interval": interval,
            "inner_steps": inner_steps, "init_steps": init_steps, "radius": radius,
            "weight_decay": weight_decay, "normalize": normalize, "clip": clip, "eps": eps, "t": 0,
        }  # fmt: skip
        super().__init__(params, defaults)
        for role in _ROLES:
            if not self._variables(role):
                raise ConfigError(
                    f"no parameter with requires_grad has role={role!r}; BO-REP needs both levels."
                )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of variables; raises `ConfigError` unless it says which level they are of."""
        if param_group.get("role") not in _ROLES:
            raise ConfigError(
                f"role={param_group.get('role')!r} of a param group is not possible; give each group "
                "role='upper' or role='lower'."
            )
        super().add_param_group(param_group)

    def step(self, upper_loss: Loss, lower_loss: Loss) -> Tensor:  # type: ignore[override]
        """Take one iteration and return the upper loss. The closures return losses, without backward."""
        upper, lower = self._variables("upper"), self._variables("lower")
        for p in lower:
            self.state[p].setdefault("z", torch.zeros_like(p))
        z = [self.state[p]["z"] for p in lower]
        group = self._group("lower")
        t = group["t"]
        settings = {"lr": group["lower_lr"], "radius": group["radius"]}
        with torch.enable_grad():
            if t == 0 and group["init_steps"]:
                refine_lower(lower, lower_loss, steps=group["init_steps"], **settings)
            elif t % group["interval"] == 0:
                descend_lower(lower, lower_loss, steps=group["inner_steps"], **settings)
            found = hypergradient(upper, lower, z, group["nu"], upper_loss, lower_loss)
        self.residual = float(joint_norm(found.implicit))
        self._step_upper(upper, found.upper)
        for each in self.param_groups:
            each["t"] = t + 1
        return found.loss

    @torch.no_grad()
    def _step_upper(self, upper: list[Tensor], h: list[Tensor]) -> None:
        group = self._group("upper")
        for p in upper:
            self.state[p].setdefault("exp_avg", torch.zeros_like(p))
        m = [self.state[p]["exp_avg"] for p in upper]
        torch._foreach_lerp_(m, h, 1 - group["beta"])
        length = float(joint_norm(m))  # One norm over all of x, not one for each tensor.
        if length <= group["eps"]:
            return
        scale = 1 / length if group["normalize"] else 1.0
        if group["clip"] is not None:
            scale = min(1.0, group["clip"] / length)
        if group["weight_decay"]:
            torch._foreach_mul_(upper, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(upper, m, alpha=-group["lr"] * scale)

    def _group(self, role: str) -> dict[str, Any]:
        return next(group for group in self.param_groups if group["role"] == role)

    def _variables(self, role: str) -> list[Tensor]:
        return [
            p
            for group in self.param_groups
            if group["role"] == role
            for p in group["params"]
            if p.requires_grad
        ]
