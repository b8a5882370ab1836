"""AuON and its hybrid: momentum rescaled by one number per tensor, in linear time (arXiv 2509.24320).

Momentum m = mu m + (1 - mu) g and its Nesterov mix G = (1 - mu) g + mu m give

    X = G / ||G||;  r = sqrt(mean cosh(gamma X)^2);  U = X / r  (paper)  or  U = G / r  (the authors' code)

r is one number, and 1 + O(1/N) for N entries: "paper" is momentum SGD normalised per tensor, "code" is plain
momentum SGD, up to that factor. `HybridAuON` puts Newton-Schulz steps between X and r, which do change the
singular values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from turnout.optim.adam import adam_state, adam_step, check_betas
from turnout.optim.base import Group, ModuleOptimizer, StatePolicy, gradient_of, in_turn, zeros_for
from turnout.tasks.validation import check_count, check_number
from turnout.wire.errors import ConfigError, unknown_name
from turnout.wire.registry import register

Variant = Literal["paper", "code"]

_MOMENTUM: Final = "momentum_buffer"
_NORM_EPS: Final = 1e-7
_RMS_EPS: Final = 1e-8
_QUINTIC: Final = (3.4445, -4.7750, 2.0315)
_RMS_SCALE: Final = 0.2


@register("auon", kind="optimizer", paper="2509.24320")
class AuON(ModuleOptimizer):
    """Momentum normalised per tensor, in linear time (AuON).

    Matrices (two dimensions or more) get the method, other parameters Adam; `for_module` leaves embeddings
    and the output layer to Adam as well, as the authors do. A group may say which with ``algo="auon"`` or
    ``"adam"``; one that does not is split by the number of dimensions.

    Parameters
    ----------
    params
        Parameters, or groups with settings of their own. A parameter's attribute ``wd_mul``, if it has one,
        multiplies its weight decay.
    lr
        Length of a tensor's step with "paper"; learning rate of momentum SGD with "code".
    momentum
        mu.
    weight_decay
        Decoupled: the weights shrink by ``lr * weight_decay`` before the step.
    gamma
        Factor inside cosh; None is 1 for "paper" and 1.5 for "code".
    variant
        "paper" divides the normalised momentum by r, "code" the momentum itself.
    ns_steps
        Newton-Schulz steps on the normalised momentum (of a tensor as a matrix of its first dimension by the
        rest); they override the variant, since the result has lost its length.
    nesterov
        Use the Nesterov mix; without, G is the momentum.
    scale
        "rms" multiplies the step by ``0.2 sqrt(N)``, so that an entry moves alike in tensors of all sizes;
        "none" as in the paper.
    adam_lr, adam_betas, adam_eps
        Adam's settings for the other parameters.
    foreach
        One kernel for all tensors of a group; None decides by device.
    """

    split_key: ClassVar[tuple[str, Any, Any]] = ("algo", "auon", "adam")
    own: ClassVar[tuple[str, ...]] = ("_adam_lr",)
    carried: ClassVar[tuple[str, ...]] = (_MOMENTUM,)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.24,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        gamma: float | None = None,
        variant: Variant = "paper",
        ns_steps: int = 0,
        nesterov: bool = True,
        scale: Literal["none", "rms"] = "none",
        adam_lr: float = 0.008,
        adam_betas: tuple[float, float] = (0.8, 0.95),
        adam_eps: float = 1e-10,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "gamma": gamma,
            "variant": variant,
            "ns_steps": ns_steps,
            "nesterov": nesterov,
            "scale": scale,
            "betas": adam_betas,
            "eps": adam_eps,
            "foreach": foreach,
        }
        check_number("adam_lr", adam_lr, low=0)
        self._adam_lr = adam_lr
        super().__init__(params, defaults)

    @classmethod
    def advise(cls, policy: StatePolicy, options: Mapping[str, Any], local_steps: int | None) -> str | None:
        """Warn of momentum that is kept for longer than a round's steps."""
        memory = 1.0 / (1.0 - options.get("momentum", 0.95))
        if policy == "keep" and local_steps is not None and local_steps < memory:
            return (
                f"optimizer_state='keep' with {local_steps} local steps: the momentum remembers about "
                f"{memory:.0f} steps and pulls to the client's own optimum from stale weights, which is "
                "harmful where clients' data differ; 'reset' bounds the drift, 'send' averages the momentum."
            )
        return None

    def parts(self, group: Group) -> list[Group]:
        """Split a group that does not say which algorithm it wants; Adam has a learning rate of its own."""
        chosen = "algo" in group and "lr" in group
        groups = super().parts(group)
        if not chosen:
            for part in groups:
                if part["algo"] == "adam":
                    part["lr"] = self._adam_lr
        return groups

    def check_group(self, group: Group) -> None:
        """Check the hyperparameters."""
        super().check_group(group)
        check_number("momentum", group["momentum"], low=0, high=1, open_high=True)
        check_number("weight_decay", group["weight_decay"], low=0)
        if group["gamma"] is not None:
            check_number("gamma", group["gamma"], low=0)
        check_count("ns_steps", group["ns_steps"], low=0)
        check_number("adam_eps", group["eps"], low=0)
        check_betas("adam_betas", group["betas"])
        for field, known in (
            ("variant", ("paper", "code")),
            ("scale", ("none", "rms")),
            ("algo", ("auon", "adam")),
        ):
            if group[field] not in known:
                raise unknown_name(field, str(group[field]), known)
        if group["algo"] == "auon" and any(p.dim() < 2 for p in group["params"]):
            raise ConfigError(
                "algo='auon' is for matrices, but the group has a parameter of fewer than two dimensions; "
                "leave algo out, or put such parameters into a group with algo='adam'."
            )

    @torch.no_grad()
    def begin_round(self, missed_rounds: int = 0, steps: int = 1) -> None:
        """Let kept momentum fade by mu for each step missed."""
        for group in self.param_groups:
            for p in group["params"]:
                if missed_rounds and _MOMENTUM in self.state.get(p, {}):
                    self.state[p][_MOMENTUM].mul_(group["momentum"] ** (missed_rounds * steps))

    def update(self, group: Group, params: list[Tensor]) -> None:
        """Take one step."""
        for some in in_turn(params, group["foreach"]):
            for p in some:
                shrink = 1.0 - group["lr"] * group["weight_decay"] * getattr(p, "wd_mul", 1.0)
                if shrink != 1.0:
                    p.mul_(shrink)
            if group["algo"] == "adam":
                self._adam(group, some)
            else:
                self._auon(group, some)

    def _adam(self, group: Group, params: list[Tensor]) -> None:
        gradients = [gradient_of(p) for p in params]
        for p, g in zip(params, gradients, strict=True):
            if "exp_avg" not in self.state[p]:
                self.state[p] = adam_state(g)
        states = [self.state[p] for p in params]
        adam_step(params, gradients, states, lr=group["lr"], betas=group["betas"], eps=group["eps"])

    def _auon(self, group: Group, params: list[Tensor]) -> None:
        mu = group["momentum"]
        gradients = [gradient_of(p) for p in params]
        for p in params:
            if _MOMENTUM not in self.state[p]:
                self.state[p] = {_MOMENTUM: zeros_for(p)}
        buffers = [self.state[p][_MOMENTUM] for p in params]
        torch._foreach_lerp_(buffers, gradients, 1 - mu)
        mixed = torch._foreach_lerp(gradients, buffers, mu) if group["nesterov"] else buffers
        gamma = group["gamma"] if group["gamma"] is not None else 1.0 if group["variant"] == "paper" else 1.5
        norms = torch._foreach_norm(mixed)
        for p, G, norm in zip(params, mixed, norms, strict=True):
            p.add_(self._direction(group, G, norm, gamma).to(p.dtype), alpha=-group["lr"])

    def _direction(self, group: Group, G: Tensor, norm: Tensor, gamma: float) -> Tensor:
        """Return U, of G's shape; zero where G is."""
        inverse = torch.where(norm > 0, 1.0 / (norm + _NORM_EPS), torch.zeros_like(norm))
        factor = _RMS_SCALE * math.sqrt(G.numel()) if group["scale"] == "rms" else 1.0
        if group["ns_steps"]:
            X = newton_schulz((G * inverse).reshape(len(G), -1), group["ns_steps"]).view_as(G)
            return X * (factor / (rms_cosh(X, gamma) + _RMS_EPS))
        r = rms_cosh(G, gamma * inverse)
        numerator = inverse if group["variant"] == "paper" else torch.ones_like(norm)
        return G * (factor * numerator / (r + _RMS_EPS))


@register("hybrid-auon", kind="optimizer", paper="2509.24320")
class HybridAuON(AuON):
    """AuON after Newton-Schulz steps on the normalised momentum (HybridAuON).

    ns_steps
        1 as in the paper; the authors' code has 5, as Muon has.
    gamma
        Factor inside cosh.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.24,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        gamma: float = 1.0,
        ns_steps: int = 1,
        nesterov: bool = True,
        scale: Literal["none", "rms"] = "none",
        adam_lr: float = 0.008,
        adam_betas: tuple[float, float] = (0.8, 0.95),
        adam_eps: float = 1e-10,
        foreach: bool | None = None,
    ) -> None:
        check_count("ns_steps", ns_steps, low=1)
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            gamma=gamma,
            ns_steps=ns_steps,
            nesterov=nesterov,
            scale=scale,
            adam_lr=adam_lr,
            adam_betas=adam_betas,
            adam_eps=adam_eps,
            foreach=foreach,
        )


def rms_cosh(X: Tensor, gamma: float | Tensor) -> Tensor:
    """Return ``sqrt(mean cosh(gamma X)^2)``, as ``sqrt(1 + mean sinh(gamma X)^2)``: it is near 1."""
    return (1.0 + torch.sinh(X * gamma).square_().mean()).sqrt_()


def newton_schulz(X: Tensor, steps: int) -> Tensor:
    """Return X after ``steps`` quintic Newton-Schulz steps, shape (m, n); ``||X|| <= 1`` is assumed.

    Each maps a singular value s to ``a s + b s^3 + c s^5``.
    """
    a, b, c = _QUINTIC
    tall = X.shape[0] > X.shape[1]
    X = X.mT if tall else X
    for _ in range(steps):
        A = X @ X.mT
        B = torch.addmm(A, A, A, beta=b, alpha=c)
        X = torch.addmm(X, B, X, beta=a)
    return X.mT if tall else X
