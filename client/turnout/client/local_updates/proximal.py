"""The primal steps of ADMM on one client, in closed form or by descent (arXiv 2409.13451)."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from turnout.client.flat_model import to_vector
from turnout.client.work import Work
from turnout.tasks.task import AdmmSolver, Vector
from turnout.wire import keys
from turnout.wire.errors import ConfigError


class ProximalSteps(Protocol):
    """Primal steps on f_k. Vectors have shape (P,); ``server_round`` seeds the minibatches, if any."""

    def start(self, w_0: Vector, server_round: int) -> tuple[Vector, Vector | None]:
        """Return the first local model, ``argmin f_k(w) + rho/2 ||w - w_0||^2``, and its reference."""

    def step(
        self, w: Vector, reference: Vector | None, s: Vector, server_round: int
    ) -> tuple[Vector, Vector | None]:
        """Return ``argmin f_k(v) - <reference, v> + rho/2 ||v - s||^2`` and its reference gradient.

        ``reference`` is (an estimate of) grad f_k(w), None where the steps imply it. On a quadratic this is
        ``(I - rho N_k) w + rho N_k s``: the ADMM step with the dual eliminated.
        """

    def dual_step(self, w: Vector, z: Vector, centre: Vector, server_round: int) -> Vector:
        """Return ``argmin f_k(v) + <z, v> + rho/2 ||v - centre||^2``, searched from ``w``."""

    def train_loss(self, w: Vector) -> float | Vector:
        """Return the loss to report for the new local model ``w``."""


class ClosedForm:
    """Exact steps by the task's solver. The reference gradient is implied by w: None."""

    def __init__(self, work: Work, solver: AdmmSolver, rho: float) -> None:
        self._work = work
        self._solver = solver
        self._rho = rho

    def start(self, w_0: Vector, server_round: int) -> tuple[Vector, Vector | None]:
        """Return ``N_k (b_k + rho w_0)``."""
        return self._solver.solve(self._rho * w_0), None

    def step(
        self, w: Vector, reference: Vector | None, s: Vector, server_round: int
    ) -> tuple[Vector, Vector | None]:
        """Return ``(I - rho N_k) w + rho N_k s``."""
        return self._solver.step(w, s), None

    def dual_step(self, w: Vector, z: Vector, centre: Vector, server_round: int) -> Vector:
        """Return ``N_k (b_k - z + rho centre)``."""
        return self._solver.solve(self._rho * centre - z)

    def train_loss(self, w: Vector) -> float:
        """Return f_k(w)."""
        return self._work.whole_loss(w)


class GradientForm:
    """Inexact steps by local training, which changes the work's model."""

    def __init__(self, work: Work, rho: float) -> None:
        self._work = work
        self._rho = rho
        self._train_loss: float | Vector = math.nan

    def start(self, w_0: Vector, server_round: int) -> tuple[Vector, Vector | None]:
        """Run the step with reference gradient 0 from ``w_0``."""
        return self.step(w_0, np.zeros_like(w_0), w_0, server_round)

    def step(
        self, w: Vector, reference: Vector | None, s: Vector, server_round: int
    ) -> tuple[Vector, Vector | None]:
        """Train from ``w`` to y; the new reference is ``r - rho (y - s)`` or, fresh, the gradient at y."""
        r = np.zeros_like(w) if reference is None else reference
        y = self._descend(w, r, s, server_round)
        if self._work.options.reference == "telescoped":
            return y, r - self._rho * (y - s)
        self._work.model.train(False)
        self._work.large_batch_gradient()
        return y, to_vector(self._work.model.gradient)

    def dual_step(self, w: Vector, z: Vector, centre: Vector, server_round: int) -> Vector:
        """Train from ``w`` with the linear term ``+z``."""
        return self._descend(w, -z, centre, server_round)

    def train_loss(self, w: Vector) -> float | Vector:
        """Return the mean minibatch loss of the last step."""
        return self._train_loss

    def _descend(self, start: Vector, linear: Vector, centre: Vector, server_round: int) -> Vector:
        work, model = self._work, self._work.model
        model.load_vector(start)
        descent = work.descend(
            centre=model.tensor(centre),
            rho=self._rho,
            linear=model.tensor(linear),
            server_round=server_round,
        )
        self._train_loss = descent.train_loss
        return model.vector()


def proximal_steps(work: Work, rho: float) -> ProximalSteps:
    """Return the task's closed form if it has one and the options allow it, else the gradient form."""
    if work.options.closed_form:
        solver = work.admm_solver(rho)
        if solver is not None:
            if work.options.weight_decay:
                raise ConfigError(
                    f"weight_decay={work.options.weight_decay} is no part of the task's closed form; "
                    "set it to 0, or closed_form to False."
                )
            return ClosedForm(work, solver, rho)
    return GradientForm(work, rho)


def initial_model(work: Work) -> Vector:
    """Return w_0 for a client without state: the record "initial", or in round 1 the received model.

    Raises `ConfigError` in a later round without that record: a made-up w_0 would bias the limit for good.
    """
    initial = work.extra(keys.INITIAL)
    if initial is not None:
        return np.array(initial)
    if work.server_round <= 1:
        return work.model.vector()
    raise ConfigError(
        f"{work.who} keeps no {work.local_update!r} state in round {work.server_round} and the "
        f"request brings no record {keys.INITIAL!r}; the strategy must send it to clients it has not heard "
        "of, and a client must keep its state between rounds."
    )
