"""Learning in field space: variational training of binary weights, task after task (arXiv 2212.02846)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from turnout.optim.adam import check_betas
from turnout.optim.base import Group, ModuleOptimizer, gradient_of, zeros_for
from turnout.optim.binary_fields import BinaryField
from turnout.tasks.validation import check_number
from turnout.wire.errors import unknown_name
from turnout.wire.registry import register

Prior = Literal["task", "stream", "none"]
_PRIORS: Final = ("task", "stream", "none")
_ROLES: Final = ("field", "plain")


@register("field-space-continual", kind="field-optimizer", paper="2212.02846")
class FieldOptimizer(ModuleOptimizer):
    """Adam on the loss's gradient plus that of ``kl_weight KL[q_theta || q_theta0]``, which is exact.

    ``params`` are groups with ``role="field"`` (fields of binary weights, default) or ``"plain"`` (ordinary
    Adam, for biases and norms); `field_groups` makes them from a model. With a loss that is a mean over N
    examples, ``kl_weight`` is the weight of the KL divided by N.

    lr, betas, eps
        As in Adam.
    beta
        Inverse temperature; keep it equal to the layers' (`set_temperature` of this class).
    kl_weight
        Weight of the divergence from the prior; 0 leaves protection to the temperature alone.
    prior
        ``"task"``: theta0 are the fields at the last `new_task`, at first those at the first step.
        ``"stream"``: those before the previous step. ``"none"``: no divergence.
    natural
        Multiply a step by s after Adam's division, which otherwise takes most of that factor out: certain
        weights then stay where they are. Off in the paper.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        beta: float = 1.0,
        kl_weight: float = 0.0,
        prior: Prior = "task",
        natural: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "betas": tuple(betas), "eps": eps, "beta": beta, "kl_weight": kl_weight,
            "prior": prior, "natural": natural, "role": "field",
        }  # fmt: skip
        super().__init__(params, defaults)

    @classmethod
    def module_groups(cls, module: nn.Module, options: Mapping[str, Any]) -> list[Group]:
        """Return the param groups of ``module``: fields of binary layers, and what else it has as "plain"."""
        return field_groups(module)

    def check_group(self, group: Group) -> None:
        """Check the hyperparameters."""
        super().check_group(group)
        check_betas("betas", group["betas"])
        for field in ("eps", "beta"):
            check_number(field, group[field], low=0, open_low=True)
        check_number("kl_weight", group["kl_weight"], low=0)
        for field, known in (("prior", _PRIORS), ("role", _ROLES)):
            if group[field] not in known:
                raise unknown_name(field, str(group[field]), known)

    def set_temperature(self, beta: float) -> None:
        """Set the inverse temperature of all groups."""
        check_number("beta", beta, low=0, open_low=True)
        for group in self.param_groups:
            group["beta"] = float(beta)

    @torch.no_grad()
    def new_task(self, prior: Mapping[Tensor, Tensor] | None = None) -> None:
        """Make the present fields the prior, or those that ``prior`` has for a parameter. Moments stay."""
        for group in self.param_groups:
            for p in group["params"] if group["role"] == "field" else ():
                given = p if prior is None else prior[p]
                self.state[p]["theta0"] = given.detach().clone()

    def update(self, group: Group, params: list[Tensor]) -> None:
        """Take one step along the gradients in ``.grad``, which stay as they are."""
        for p in params:
            self._step(p, group)

    def _step(self, p: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[p], gradient_of(p)
        if "step" not in state:
            state |= {"step": 0, "exp_avg": zeros_for(p), "exp_avg_sq": zeros_for(p)}
        field = group["role"] == "field"
        beta = group["beta"]
        spread = 1 - torch.tanh(beta * p).square() if field else None
        if spread is not None and group["prior"] != "none":
            theta0 = state.setdefault("theta0", p.clone())
            if group["kl_weight"]:
                gradient = gradient + group["kl_weight"] * beta**2 * spread * (p - theta0)
            if group["prior"] == "stream":
                theta0.copy_(p)
        state["step"] += 1
        b1, b2 = group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - b1)
        state["exp_avg_sq"].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        first = state["exp_avg"] / (1 - b1 ** state["step"])
        second = state["exp_avg_sq"] / (1 - b2 ** state["step"])
        step = first / (second.sqrt() + group["eps"])
        if spread is not None and group["natural"]:
            step = step * spread
        p.add_(step.to(p.dtype), alpha=-group["lr"])


def field_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return the param groups of ``module``: fields of binary layers, and what else it has as "plain"."""
    fields = [layer.theta for layer in module.modules() if isinstance(layer, BinaryField)]
    known = {id(p) for p in fields}
    plain = [p for p in module.parameters() if id(p) not in known]
    groups = [{"params": fields, "role": "field"}, {"params": plain, "role": "plain"}]
    return [group for group in groups if group["params"]]


def annealed(step: int, total: int) -> float:
    """Return beta of ``step`` (from 0) of ``total``: ``10 tanh(0.1 + 2 (step + 1) / total)``, up to 9.7."""
    return 10.0 * math.tanh(0.1 + 2.0 * (step + 1) / total)
