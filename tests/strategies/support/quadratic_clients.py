"""Clients with quadratic losses ``w'A w / 2 - b'w``, solved exactly in NumPy: what theory is checked with.

ADMM clients follow the card of RERCE-Fed (arXiv 2409.13451); FedDyn's, SCAFFOLD's and FedAMD's their papers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vectors import Vector

from turnout.strategies import Instruction, Reply, StreamingStrategy
from turnout.strategies.exact_sum import peak


class Quadratic:
    """The loss of one client, and the state that its algorithms keep."""

    def __init__(self, hessian: Vector, linear: Vector) -> None:
        self.hessian, self.linear = hessian, linear
        self.w: Vector | None = None
        self.z = np.zeros_like(linear)
        self.control = np.zeros_like(linear)
        self.received: Vector | None = None
        self.last_round = 0

    def gradient(self, w: Vector) -> Vector:
        return self.hessian @ w - self.linear

    def solve(self, rho: float, right: Vector) -> Vector:
        """Return ``(A + rho I)^-1 right``."""
        return np.linalg.solve(self.hessian + rho * np.eye(len(right)), right)

    def relax(self, rho: float, s: Vector) -> Vector:
        """Return ``(I - rho N) w + rho N s``: the ADMM update with the dual eliminated."""
        assert self.w is not None
        return self.w - rho * self.solve(rho, self.w - s)

    def admm(self, t: int, received: Vector, config: dict[str, Any], initial: Vector | None) -> Vector:
        rho, continual, extrapolate = config["rho"], config["continual"], config.get("extrapolate", False)
        first_contact = self.w is None
        if first_contact:
            assert initial is not None, "a client never heard of must get w_0"
            self.w = self.solve(rho, self.linear + rho * initial)
            self.received, self.start = initial, initial
            if t == 1:
                self.received, self.last_round = received, 1
                return 2 * self.w - initial if continual else self.w
            self.last_round = 1
        assert self.received is not None
        if continual:
            for _ in range(t - self.last_round - 1):
                self.w = self.relax(rho, self.received)
        s = 2 * received - self.received if extrapolate else received
        old, self.w = self.w, self.relax(rho, s)
        self.received, self.last_round = received, t
        return 2 * self.w - old if continual else self.w

    def dual_admm(self, t: int, received: Vector, config: dict[str, Any], initial: Vector | None) -> Vector:
        rho = config["rho"]
        if self.w is not None:
            self.z = self.z + rho * (self.w - received)
        else:
            assert initial is not None
        self.w = self.solve(rho, self.linear - self.z + rho * received)
        return self.w + self.z / rho

    def dyn(self, received: Vector, config: dict[str, Any]) -> Vector:
        alpha = config["dyn-alpha"]
        self.w = self.solve(alpha, self.linear + self.z + alpha * received)
        self.z = self.z - alpha * (self.w - received)
        return self.w

    def scaffold(self, received: Vector, control: Vector, steps: int, lr: float) -> tuple[Vector, Vector]:
        y = received
        for _ in range(steps):
            y = y - lr * (self.gradient(y) - self.control + control)
        fresh = self.control - control + (received - y) / (steps * lr)
        change, self.control = fresh - self.control, fresh
        return y, change

    def mine(self, received: Vector, bullseye: Vector, steps: int, lr: float) -> Vector:
        before = y = received
        q = bullseye
        for _ in range(steps):
            q = q - self.gradient(before) + self.gradient(y)
            before, y = y, y - lr * q
        return y

    def descend(self, received: Vector, steps: int, lr: float) -> Vector:
        y = received
        for _ in range(steps):
            y = y - lr * self.gradient(y)
        return y


def federation(
    seed: int, count: int, size: int, *, examples: int = 6, spread: float = 1.0
) -> list[Quadratic]:
    """Least-squares clients with their own designs; ``examples < size`` leaves each under-determined."""
    rng = np.random.default_rng(seed)
    clients = []
    for _ in range(count):
        x = rng.standard_normal((examples, size)) / np.sqrt(examples)
        y = x @ np.ones(size) + spread * rng.standard_normal(examples)
        clients.append(Quadratic(2 * x.T @ x, 2 * x.T @ y))
    return clients


def pooled_optimum(clients: list[Quadratic]) -> Vector:
    return np.linalg.solve(sum(c.hessian for c in clients), sum(c.linear for c in clients))


def run_round(
    strategy: StreamingStrategy,
    t: int,
    clients: list[Quadratic],
    available: list[int] | None = None,
    *,
    steps: int = 5,
    lr: float = 0.05,
) -> dict[int, Instruction]:
    """Run one round with exact clients and return what was asked of whom."""
    strategy.begin_round(t, range(len(clients)))
    cohort = strategy.select(t, list(range(len(clients))) if available is None else available)
    received = np.asarray(strategy.broadcast())
    for node, asked in cohort.items():
        client, vectors = clients[node], dict[str, Vector]()
        if asked.local_update in ("admm", "dual-admm"):
            update = client.admm if asked.local_update == "admm" else client.dual_admm
            value = update(t, received, asked.config, asked.vectors.get("initial"))
        elif asked.local_update == "dyn":
            value = client.dyn(received, asked.config)
        elif asked.local_update == "scaffold":
            value, vectors["control"] = client.scaffold(received, asked.vectors["control"], steps, lr)
        elif asked.local_update == "anchor":
            value = client.gradient(received)
        elif asked.local_update == "miner":
            value = client.mine(received, asked.vectors["bullseye"], steps, lr)
        else:
            value = client.descend(received, steps, lr)
        if asked.reply == "update":
            value = value - received
        strategy.accept(t, Reply(node, value, 1, peak(value), asked.local_update, vectors))
    strategy.end_round(t)
    return cohort
