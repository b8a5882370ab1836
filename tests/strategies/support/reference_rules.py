"""The server rules as the papers state them, in plain float64, written from the method cards alone.

One class per rule. `Rule.round` gets what arrived; nothing here shares code with `turnout.strategies`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Vector = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Arrival:
    """One accepted reply: ``model`` after training from ``received``, or a ``gradient``."""

    client: int
    examples: int
    role: str
    received: Vector
    model: Vector | None = None
    gradient: Vector | None = None
    control: Vector | None = None

    @property
    def delta(self) -> Vector:
        assert self.model is not None
        return self.model - self.received


class Rule:
    """``x`` is the model, ``clients`` all that were ever registered (N is their number)."""

    def __init__(self, lr: float = 1.0, weights: str = "uniform") -> None:
        self.lr = lr
        self.weights = weights
        self.examples: dict[int, int] = {}

    def begin(self, x: Vector) -> None:
        self.x = x.copy()
        self.setup()

    def setup(self) -> None:
        """Start with zero state."""

    def round(self, clients: list[int], arrivals: list[Arrival]) -> None:
        self.clients = clients
        for arrival in arrivals:
            self.examples[arrival.client] = arrival.examples
        self.step(arrivals)

    def step(self, arrivals: list[Arrival]) -> None:
        raise NotImplementedError

    def sent(self) -> Vector:
        """What clients receive."""
        return self.x

    def alpha(self, client: int) -> float:
        """1 / N, or n_i / n where those not heard of count as the mean of the others."""
        if self.weights == "uniform":
            return 1 / len(self.clients)
        mean = sum(self.examples.values()) / len(self.examples)
        return self.examples[client] / (mean * len(self.clients))


class FedAvg(Rule):
    def step(self, arrivals: list[Arrival]) -> None:
        if arrivals:
            n = [a.examples if self.weights == "examples" else 1 for a in arrivals]
            self.x = self.x + self.lr * sum(w * a.delta for w, a in zip(n, arrivals, strict=True)) / sum(n)


class ServerECO(Rule):
    """ECO-SGDM on -mean D as gradient, with the first tensor, of rows of 5, on the grid; z is conserved."""

    def __init__(self, lr: float, bits: int, beta: float = 0.9, stochastic: bool = False) -> None:
        super().__init__(lr)
        self.most, self.beta, self.stochastic = 2 ** (bits - 1) - 1, beta, stochastic

    def setup(self) -> None:
        self.m, self.z, self.t = np.zeros_like(self.x), self.x.copy(), 0

    def step(self, arrivals: list[Arrival]) -> None:
        self.t += 1
        if not arrivals:
            return
        mean = sum(a.examples * a.delta for a in arrivals) / sum(a.examples for a in arrivals)
        self.m = self.beta * self.m - (1 - self.beta) * mean
        wanted = self.x - self.lr * self.m
        width = (len(wanted) - 1) // 6  # Of the matrix, then as long a vector and a number.
        rows = wanted[: 5 * width].reshape(width, 5)
        scale = np.abs(rows).max(axis=1, keepdims=True) / self.most
        noise = np.random.default_rng([0, self.t, 0]).random(rows.shape) if self.stochastic else 0.5
        rounded = np.clip(np.floor(rows / scale + noise), -self.most, self.most) * scale
        self.x = np.concatenate([rounded.reshape(-1), wanted[5 * width :]])
        self.m = self.m + (1 - 1 / self.beta) / self.lr * (wanted - self.x)
        self.z = self.z + self.lr * mean
        virtual = self.x - self.lr * self.beta / (1 - self.beta) * self.m
        np.testing.assert_allclose(virtual, self.z, atol=1e-9)


class Weighted(Rule):
    """``average_all`` and, with p, ``known_prob``."""

    def __init__(self, lr: float, weights: str, p: Mapping[int, float] | None = None) -> None:
        super().__init__(lr, weights)
        self.p = p

    def factor(self, client: int) -> float:
        return 1 / self.p[client] if self.p else 1.0

    def step(self, arrivals: list[Arrival]) -> None:
        for a in arrivals:
            self.x = self.x + self.lr * self.alpha(a.client) * self.factor(a.client) * a.delta


class Intervals:
    """FedAU's estimator as its second algorithm has it: the list of closed intervals."""

    def __init__(self, cutoff: int | None) -> None:
        self.cutoff = cutoff
        self.closed: dict[int, list[int]] = {}
        self.open: dict[int, int] = {}

    def register(self, clients: list[int]) -> None:
        for client in clients:
            self.closed.setdefault(client, [])
            self.open.setdefault(client, 0)

    def omega(self, client: int) -> float:
        intervals = self.closed[client]
        return sum(intervals) / len(intervals) if intervals else 1.0

    def observe(self, participants: set[int]) -> None:
        for client in self.open:
            self.open[client] += 1
            if client in participants or self.open[client] == self.cutoff:
                self.closed[client].append(self.open[client])
                self.open[client] = 0


class FedAU(Weighted):
    def __init__(self, lr: float, weights: str, cutoff: int | None) -> None:
        super().__init__(lr, weights)
        self.intervals = Intervals(cutoff)

    def factor(self, client: int) -> float:
        return self.intervals.omega(client)

    def step(self, arrivals: list[Arrival]) -> None:
        self.intervals.register(self.clients)
        super().step(arrivals)
        self.intervals.observe({a.client for a in arrivals})


class FedStale(Rule):
    def __init__(
        self,
        lr: float,
        weights: str,
        beta: float,
        p: Mapping[int, float] | None,
        *,
        skip: bool = False,
        largest: float = np.inf,
    ) -> None:
        super().__init__(lr, weights)
        self.beta, self.p, self.skip, self.largest = beta, p, skip, largest
        self.intervals = Intervals(None)

    def setup(self) -> None:
        self.h: dict[int, Vector] = {}

    def step(self, arrivals: list[Arrival]) -> None:
        self.intervals.register(self.clients)
        zero = np.zeros_like(self.x)
        total = zero
        for a in arrivals:
            inverse = self.intervals.omega(a.client) if self.p is None else 1 / self.p[a.client]
            weight = self.alpha(a.client) * min(inverse, self.largest)
            total = total + weight * (a.delta - self.beta * self.h.get(a.client, zero))
        for client, h in self.h.items():
            total = total + self.beta * self.alpha(client) * h
        if arrivals or not self.skip:
            self.x = self.x + self.lr * total
        self.h |= {a.client: a.delta for a in arrivals}
        self.intervals.observe({a.client for a in arrivals})


class FedVARP(Rule):
    """The original rule; an empty round does not move."""

    def setup(self) -> None:
        self.y: dict[int, Vector] = {}

    def step(self, arrivals: list[Arrival]) -> None:
        if arrivals:
            zero = np.zeros_like(self.x)
            mean = sum(self.y.values(), zero) / len(self.clients)
            fresh = sum(a.delta - self.y.get(a.client, zero) for a in arrivals) / len(arrivals)
            self.x = self.x + self.lr * (mean + fresh)
        self.y |= {a.client: a.delta for a in arrivals}


class MIFA(Rule):
    def setup(self) -> None:
        self.y: dict[int, Vector] = {}

    def step(self, arrivals: list[Arrival]) -> None:
        self.y |= {a.client: a.delta for a in arrivals}
        for client, y in self.y.items():
            self.x = self.x + self.lr * self.alpha(client) * y


class FedAMD(Rule):
    def setup(self) -> None:
        self.v: dict[int, Vector] = {}
        self.bullseye = np.zeros_like(self.x)

    def step(self, arrivals: list[Arrival]) -> None:
        miners = [a for a in arrivals if a.role == "miner"]
        if miners:
            self.x = self.x + self.lr * sum(a.delta for a in miners) / len(miners)
        for a in arrivals:
            if a.role == "anchor":
                assert a.gradient is not None
                self.v[a.client] = a.gradient
        if self.v:
            self.bullseye = sum(self.v.values()) / len(self.v)


class Participants(Rule):
    """The mean of the scheduled clients' models."""

    def step(self, arrivals: list[Arrival]) -> None:
        if arrivals:
            self.x = sum(a.model for a in arrivals if a.model is not None) / len(arrivals)


class Scheduled(Participants):
    """RERCE-Fed: the same, and the server sends ``2 w_n - w_{n-1}``."""

    def setup(self) -> None:
        self.before = self.x

    def step(self, arrivals: list[Arrival]) -> None:
        if arrivals:
            self.before = self.x
        super().step(arrivals)

    def sent(self) -> Vector:
        return 2 * self.x - self.before


class Slots(Rule):
    """The mean of every client's last upload."""

    def setup(self) -> None:
        self.slots: dict[int, Vector] = {}

    def step(self, arrivals: list[Arrival]) -> None:
        self.slots |= {a.client: a.model for a in arrivals if a.model is not None}
        if arrivals:
            self.x = sum(self.slots.values()) / len(self.slots)


class Continual(Slots):
    """RERCE-Fed with continual local updates: at the server the same as dual ADMM's slots."""


class Scaffold(Rule):
    def setup(self) -> None:
        self.control = np.zeros_like(self.x)

    def step(self, arrivals: list[Arrival]) -> None:
        if arrivals:
            self.x = self.x + self.lr * sum(a.delta for a in arrivals) / len(arrivals)
        for a in arrivals:
            assert a.control is not None
            self.control = self.control + a.control / len(self.clients)


class FedDyn(Rule):
    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.dyn_alpha = alpha

    def setup(self) -> None:
        self.h = np.zeros_like(self.x)

    def step(self, arrivals: list[Arrival]) -> None:
        if arrivals:
            self.h = self.h - self.dyn_alpha / len(self.clients) * sum(a.delta for a in arrivals)
            mean = sum(a.model for a in arrivals if a.model is not None) / len(arrivals)
            self.x = mean - self.h / self.dyn_alpha


class BORep(Rule):
    """Normalised momentum on the mean hypergradient; ``beta`` 0.9."""

    def __init__(self, eta: float, weights: str = "uniform", *, normalize: bool = True) -> None:
        super().__init__(eta, weights)
        self.normalize = normalize

    def setup(self) -> None:
        self.m = np.zeros_like(self.x)

    def step(self, arrivals: list[Arrival]) -> None:
        if arrivals:
            p = [a.examples if self.weights == "examples" else 1 for a in arrivals]
            h = sum(w * a.gradient for w, a in zip(p, arrivals, strict=True) if a.gradient is not None) / sum(
                p
            )
            self.m = 0.9 * self.m + 0.1 * h
            self.x = self.x - self.lr * self.m / (np.linalg.norm(self.m) if self.normalize else 1.0)


class BORepLocalUpper(Rule):
    """y is averaged in rounds 1, I + 2, ...; in the others only z moves."""

    def step(self, arrivals: list[Arrival]) -> None:
        if arrivals and arrivals[0].model is not None:
            self.x = self.x + sum(a.delta for a in arrivals) / len(arrivals)
