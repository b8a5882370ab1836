"""Shared by the least-squares tasks: linear model, exact pooled solution, closed-form ADMM steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from turnout.tasks.quadratic import QuadraticSolver
from turnout.tasks.task import ClientData, Task, Vector
from turnout.tasks.validation import check_number
from turnout.wire.arrays import view


@dataclass(frozen=True)
class Design:
    """One client's rows: ``x`` (n, L), ``y`` (n,) and ``weights`` (n,), the diagonal of W_k, all float64."""

    x: Vector
    y: Vector
    weights: Vector


class LinearModel(nn.Module):
    """``x @ w`` with one float64 parameter ``w`` of length L, zero at first."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(dimension, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return predictions, shape (n,)."""
        return x @ self.w


class LeastSquaresTask(Task):
    """Clients' objectives ``J_k(w) = ||y_k - X_k w||^2_{W_k}``; the federation minimises their sum.

    The exact answer is `solution`. Targets that clients train on have two columns, y and n_k times the
    weight, so that the mean over any batch is an unbiased estimate of J_k and over all examples is J_k
    itself.
    """

    def __init__(self, designs: tuple[Design, ...]) -> None:
        self.designs = designs
        self.num_clients = len(designs)
        self.dimension = designs[0].x.shape[1]
        self._clients = [
            ClientData(torch.from_numpy(d.x), torch.from_numpy(np.stack([d.y, len(d.y) * d.weights], axis=1)))
            for d in designs
        ]
        self._solvers: dict[int, QuadraticSolver] = {}

    def model(self) -> nn.Module:
        """Return the linear model at zero."""
        return LinearModel(self.dimension)

    def client_data(self, client: int) -> ClientData:
        """Return x (n, L) and targets (n, 2), see the class."""
        return self._clients[client]

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the estimate of J_k from a batch."""
        return (y[:, 1] * (output - y[:, 0]).square()).mean()

    def curvature(self, client: int) -> tuple[Vector, Vector]:
        """Return ``A_k = 2 X'WX`` (L, L) and ``b_k = 2 X'Wy`` (L,): J_k = w'A_k w / 2 - b_k'w + constant."""
        d = self.designs[client]
        weighted = d.weights[:, None] * d.x
        return 2.0 * d.x.T @ weighted, 2.0 * weighted.T @ d.y

    def admm_solver(self, client: int, rho: float) -> QuadraticSolver:
        """Return the exact proximal steps of client ``client``; raises `ConfigError` unless rho > 0."""
        solver = self._solvers.get(client)
        if solver is None or solver.rho != rho:
            check_number("rho", rho, low=0, open_low=True)
            if solver is None:
                d = self.designs[client]
                solver = QuadraticSolver.of(d.x, d.y, d.weights, rho)
            solver = self._solvers[client] = replace(
                solver, rho=rho
            )  # The eigenbasis does not depend on rho.
        return solver

    @cached_property
    def solution(self) -> Vector:
        """The pooled weighted least-squares solution w*, shape (L,), in float64."""
        roots = [np.sqrt(d.weights) for d in self.designs]
        x = np.concatenate([root[:, None] * d.x for root, d in zip(roots, self.designs, strict=True)])
        y = np.concatenate([root * d.y for root, d in zip(roots, self.designs, strict=True)])
        # The triangle of (X y) holds the whole problem in L + 1 rows.
        triangle = np.asarray(np.linalg.qr(np.column_stack([x, y]), mode="r"))
        solution: Vector = np.linalg.lstsq(triangle[:, :-1], triangle[:, -1], rcond=None)[0]
        return solution

    def nmsd(self, vectors: Vector) -> float:
        """Return the mean over rows of ``||w - w*||^2 / ||w*||^2`` for one vector (L,) or several (m, L)."""
        errors = np.square(np.atleast_2d(vectors) - self.solution).sum(axis=1)
        return float(errors.mean() / np.square(self.solution).sum())

    def evaluate(self, arrays: ArrayRecord) -> dict[str, float]:
        """Return "loss" (mean of J_k), "rmse" (root mean squared residual over all rows) and "nmsd"."""
        w = view(arrays["w"])
        residuals = [d.y - d.x @ w for d in self.designs]
        losses = [float(d.weights @ r**2) for d, r in zip(self.designs, residuals, strict=True)]
        rmse = float(np.sqrt(np.mean(np.concatenate(residuals) ** 2)))
        return {"loss": float(np.mean(losses)), "rmse": rmse, "nmsd": self.nmsd(w)}
