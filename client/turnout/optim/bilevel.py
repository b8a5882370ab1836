"""The pieces of a stochastic bilevel method: lower steps, the implicit vector, the hypergradient.

For ``Phi(x) = f(x, y*(x))`` with ``y*(x) = argmin_y g(x, y)``: ``dPhi = d_x f - d2_xy g z`` where z solves
``d2_yy g z = d_y f``. Products with second derivatives are double backward passes; no matrix is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Loss = Callable[[], Tensor]
"""A scalar loss on a minibatch, differentiable in the variables; each call may draw a fresh minibatch."""


@dataclass(frozen=True, slots=True)
class Hypergradient:
    """What one evaluation gives.

    ``upper`` is h, one tensor per upper variable; ``implicit`` is the residual ``d2_yy g z - d_y f`` at the
    z that was given, one tensor per lower variable; ``loss`` the upper loss.
    """

    upper: list[Tensor]
    implicit: list[Tensor]
    loss: Tensor


def hypergradient(
    upper: Sequence[Tensor],
    lower: Sequence[Tensor],
    z: Sequence[Tensor],
    nu: float,
    upper_loss: Loss,
    lower_loss: Loss,
) -> Hypergradient:
    """Step ``z -= nu (d2_yy g z - d_y f)`` in place, then return ``h = d_x f - d2_xy g z`` with the new z.

    ``nu = 0`` leaves z as it is. The order (z first, h with the new z) is the one of the authors' code; the
    paper's is the reverse, which differs by O(nu).
    """
    loss = upper_loss()
    explicit = torch.autograd.grad(loss, [*upper, *lower], materialize_grads=True, allow_unused=True)
    f_x, f_y = explicit[: len(upper)], explicit[len(upper) :]
    g_y = torch.autograd.grad(
        lower_loss(), list(lower), create_graph=True, materialize_grads=True, allow_unused=True
    )
    hessian_z = _product(g_y, z, lower, keep=True)
    residual = [Hz - f for Hz, f in zip(hessian_z, f_y, strict=True)]
    if nu:
        torch._foreach_add_(list(z), residual, alpha=-nu)
    cross = _product(g_y, z, upper, keep=False)
    h = [f - c for f, c in zip(f_x, cross, strict=True)]
    return Hypergradient(h, residual, loss.detach())


def _product(
    g_y: Sequence[Tensor], z: Sequence[Tensor], variables: Sequence[Tensor], *, keep: bool
) -> Sequence[Tensor]:
    """Return the derivative of ``<d_y g, z>`` with respect to ``variables``; zeros where g is linear in y."""
    inner = sum(((g * v.detach()).sum() for g, v in zip(g_y, z, strict=True)), start=g_y[0].new_zeros(()))
    if not inner.requires_grad:
        return [torch.zeros_like(v) for v in variables]
    return torch.autograd.grad(
        inner, list(variables), retain_graph=keep, materialize_grads=True, allow_unused=True
    )


def descend_lower(
    lower: Sequence[Tensor], lower_loss: Loss, *, lr: float, steps: int, radius: float | None = None
) -> None:
    """Take ``steps`` SGD steps on g in place, kept inside a ball of ``radius`` around where they started.

    None is no ball; the last iterate is kept.
    """
    variables = list(lower)
    start = [v.detach().clone() for v in variables] if radius is not None else []
    for _ in range(steps):
        gradient = torch.autograd.grad(lower_loss(), variables, materialize_grads=True, allow_unused=True)
        with torch.no_grad():
            torch._foreach_add_(variables, list(gradient), alpha=-lr)
            if radius is not None:
                _project(variables, start, radius)


_REFINEMENT_EPOCHS = 4


def refine_lower(
    lower: Sequence[Tensor], lower_loss: Loss, *, lr: float, steps: int, radius: float | None = None
) -> None:
    """Refine the initial y: ``steps`` SGD steps; with a ``radius``, in epochs that halve step and ball."""
    if radius is None:
        descend_lower(lower, lower_loss, lr=lr, steps=steps)
        return
    for epoch in range(_REFINEMENT_EPOCHS):
        part = steps * (epoch + 1) // _REFINEMENT_EPOCHS - steps * epoch // _REFINEMENT_EPOCHS
        shrink = 0.5**epoch
        descend_lower(lower, lower_loss, lr=lr * shrink, steps=part, radius=radius * shrink)


def joint_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all ``tensors`` together, computed in float32 or better."""
    squares = [t.detach().to(torch.promote_types(t.dtype, torch.float32)).square().sum() for t in tensors]
    return torch.stack(squares).sum().sqrt()


def _project(variables: Sequence[Tensor], centre: Sequence[Tensor], radius: float) -> None:
    away = [v - c for v, c in zip(variables, centre, strict=True)]
    distance = float(joint_norm(away))
    if distance > radius:
        for v, c, d in zip(variables, centre, away, strict=True):
            v.copy_(c + d * (radius / distance))
