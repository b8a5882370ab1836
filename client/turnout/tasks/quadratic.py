"""Closed-form ADMM steps on weighted least squares (arXiv 2409.13451)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from turnout.tasks.task import Vector


@dataclass(frozen=True)
class QuadraticSolver:
    """Exact proximal steps on ``f(w) = ||y - X w||^2_W``, so ``A = 2 X'WX`` and ``b = 2 X'Wy``.

    In the eigenbasis of A restricted to its range, ``basis`` (L, r) with eigenvalues ``curvature`` (r,) > 0,
    both steps cost O(L r), and a client without data (r = 0) copies what it receives exactly.
    """

    basis: Vector
    curvature: Vector
    linear: Vector
    rho: float

    @classmethod
    def of(cls, x: Vector, y: Vector, weights: Vector, rho: float) -> QuadraticSolver:
        """Return the solver for design ``x`` (n, L), targets ``y`` (n,) and weights ``weights`` (n,)."""
        root = np.sqrt(weights)
        _, singular, rows = np.linalg.svd(root[:, None] * x, full_matrices=False)
        cutoff = max(x.shape) * np.finfo(np.float64).eps * singular.max(initial=0.0)
        kept = singular > cutoff
        basis = np.ascontiguousarray(rows[kept].T)
        return cls(basis, 2.0 * singular[kept] ** 2, 2.0 * x.T @ (weights * y), rho)

    def solve(self, v: Vector) -> Vector:
        """Return ``N (b + v)`` with ``N = (A + rho I)^-1``."""
        target = self.linear + v
        along = self.basis.T @ target
        # Outside the range of A, N is 1/rho.
        correction = along / (self.curvature + self.rho) - along / self.rho
        result: Vector = target / self.rho + self.basis @ correction
        return result

    def step(self, w: Vector, s: Vector) -> Vector:
        """Return ``(I - rho N) w + rho N s``, as ``s + N A (w - s)``: no cancellation near consensus."""
        shrink = self.curvature / (self.curvature + self.rho)
        result: Vector = s + self.basis @ (shrink * (self.basis.T @ (w - s)))
        return result
