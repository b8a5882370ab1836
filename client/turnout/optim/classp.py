"""CLASSP: adjustment suppression and sparsity promotion for continual learning (arXiv 2405.09637).

A generalised AdaGrad whose accumulator is the memory of earlier tasks, and a threshold on the squared
gradient that leaves weights of small gradient alone:

    mask = g^2 > theta;  S += mask |g|^p;  w -= mask lr g / (eps + S)^(1/p)

The sum includes the present gradient, as in the paper's pseudocode (its displayed equation may be read
without). Without scaling, w -= mask lr g while S still grows, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from turnout.optim.base import (
    Group,
    ModuleOptimizer,
    StatePolicy,
    gradient_of,
    in_turn,
    step_count,
    zeros_for,
)
from turnout.tasks.validation import check_number
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register

_SUM = "grad_sum"
_ACTIVE = "active"


@register("classp", kind="optimizer", paper="2405.09637")
class CLASSP(ModuleOptimizer):
    """Thresholded, generalised AdaGrad for task sequences (CLASSP).

    Parameters
    ----------
    params
        Parameters, or groups with settings of their own. All settings may be changed between tasks, in
        ``param_groups``: typically ``apply_scaling`` and ``threshold``.
    lr
        Step size; with ``power=1`` also the largest step of one weight.
    threshold
        theta, on the SQUARED gradient of each weight. The authors' 0.5 belongs to code in which it has no
        such effect; useful values for mean losses are 1e-6 to 1e-3.
    eps
        Added to the accumulator, inside the root.
    power
        p, the power of the gradient in the accumulator; 2 is AdaGrad.
    apply_scaling
        Divide by the accumulator's root; without, steps are thresholded SGD.
    weight_decay
        Decoupled, and only where the mask lets a weight move: the paper has none.
    density
        Take as threshold what lets this share of each tensor's weights pass, instead of ``threshold``.
    legacy
        Do as the authors' code does: one mask per tensor (any nonzero gradient), and |g| in the accumulator
        whatever ``power`` is.
    count_active
        Keep how many weights the last step's mask let pass, for `mask_density`.
    foreach
        One kernel for all tensors of a group; None decides by device.
    """

    carried: ClassVar[tuple[str, ...]] = (_SUM,)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.2,
        threshold: float = 0.5,
        eps: float = 1e-5,
        power: float = 1.0,
        apply_scaling: bool = True,
        weight_decay: float = 0.0,
        density: float | None = None,
        legacy: bool = False,
        count_active: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "threshold": threshold,
            "eps": eps,
            "power": power,
            "apply_scaling": apply_scaling,
            "weight_decay": weight_decay,
            "density": density,
            "legacy": legacy,
            "count_active": count_active,
            "foreach": foreach,
            "frozen": False,
        }
        super().__init__(params, defaults)

    @classmethod
    def advise(cls, policy: StatePolicy, options: Mapping[str, Any], local_steps: int | None) -> str | None:
        """Refuse to reset: the accumulator is the memory of earlier tasks."""
        if policy == "reset" and options.get("apply_scaling", True):
            raise ConfigError(
                "optimizer_state='reset' destroys CLASSP: its accumulator is the memory of earlier tasks "
                "(reset at a task's end, accuracy on it falls as with SGD); use optimizer_state='keep' "
                "or 'send', or apply_scaling=False for thresholded SGD."
            )
        return None

    def check_group(self, group: Group) -> None:
        """Check the hyperparameters."""
        super().check_group(group)
        check_number("threshold", group["threshold"], low=0)
        check_number("eps", group["eps"], low=0, open_low=True)
        check_number("power", group["power"], low=0, open_low=True)
        check_number("weight_decay", group["weight_decay"], low=0)
        if group["density"] is not None:
            check_number("density", group["density"], low=0, high=1, open_low=True)
            if group["legacy"]:
                raise ConfigError("density needs one mask per weight; set legacy=False or density=None.")

    def update(self, group: Group, params: list[Tensor]) -> None:
        """Take one step."""
        for p in params:
            if not self.state[p]:
                self.state[p] = {"step": step_count(), _SUM: zeros_for(p)}
        for some in in_turn(params, group["foreach"]):
            self._update(group, some)

    def _update(self, group: Group, params: list[Tensor]) -> None:
        lr, power, eps = group["lr"], group["power"], group["eps"]
        gradients = [gradient_of(p) for p in params]
        masks = [_mask(group, g) for g in gradients]
        sums = [self.state[p][_SUM] for p in params]
        for p, mask in zip(params, masks, strict=True):
            self.state[p]["step"] += 1
            if group["count_active"]:
                self.state[p][_ACTIVE] = mask.sum()
        masked = torch._foreach_mul(gradients, masks)
        if not group["frozen"]:
            sizes = torch._foreach_abs(masked)
            if power != 1.0 and not group["legacy"]:
                torch._foreach_pow_(sizes, power)
            torch._foreach_add_(sums, sizes)
        if group["weight_decay"]:
            kept = torch._foreach_mul([m.to(p.dtype) for m, p in zip(masks, params, strict=True)], params)
            torch._foreach_sub_(params, kept, alpha=lr * group["weight_decay"])
        if group["apply_scaling"]:
            scales = torch._foreach_add(sums, eps)
            if power == 2.0:
                torch._foreach_sqrt_(scales)
            elif power != 1.0:
                torch._foreach_pow_(scales, 1.0 / power)
            torch._foreach_div_(masked, scales)
        # A weight that is not to move stays as it is to the bit: its step is a zero.
        torch._foreach_add_(params, [m.to(p.dtype) for m, p in zip(masked, params, strict=True)], alpha=-lr)

    def freeze_accumulator(self, frozen: bool = True) -> None:
        """Stop (or, with False, resume) adding gradients to the accumulator."""
        for group in self.param_groups:
            group["frozen"] = frozen

    def average_grad_sum(self) -> float:
        """Return the accumulator's mean over all weights that have one; 0 before the first step."""
        sums = [state[_SUM] for state in self.state.values() if _SUM in state]
        total = sum(float(s.sum(dtype=torch.float64)) for s in sums)
        return float(total / max(1, sum(s.numel() for s in sums)))

    def mask_density(self) -> float:
        """Return the share of weights that the last step let move; needs ``count_active``."""
        counted = [(p, state[_ACTIVE]) for p, state in self.state.items() if _ACTIVE in state]
        if not counted:
            raise ConfigError("no weights were counted; set count_active=True and take a step.")
        passed = sum(int(active) for _, active in counted)
        return float(passed / sum(p.numel() for p, _ in counted))


def _mask(group: Group, gradient: Tensor) -> Tensor:
    """Return which weights may move, of the gradient's shape."""
    if group["legacy"]:
        # (g ** 2).any() > threshold: a truth value compared with a number.
        moves = bool((gradient != 0).any()) > group["threshold"]
        return torch.full_like(gradient, moves, dtype=torch.bool)
    squares = gradient * gradient
    if group["density"] is None:
        return squares.gt(group["threshold"])
    passing = max(1, round(group["density"] * gradient.numel()))
    least = squares.flatten().kthvalue(gradient.numel() - passing + 1).values
    passes: Tensor = (squares >= least) & (squares > 0)
    return passes
