"""BO-REP with a shared upper level: normalised momentum on the server (Hao, Gong, Liu, arXiv 2401.09587).

``min_x sum_k p_k f_k(x, y_k*(x))``: the representation x travels, each client keeps its own y_k and z_k and
sends its hypergradient h_k. ``m <- beta m + (1 - beta) h``; ``x <- x - eta_t m / ||m||`` with h the mean of
the participants' h_k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from turnout.strategies.array_api import array_namespace
from turnout.strategies.checks import choice, number, unused, whole_number
from turnout.strategies.rounds import Instruction, Reply, Scalar
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import keys, register


@dataclass(kw_only=True)
class Bilevel(StreamingStrategy):
    """What both forms of BO-REP have: its step sizes and its momentum.

    eta
        Length of every step of x.
    decay
        ``"constant"``, or ``"sqrt"``: eta / sqrt(t) in step t, so that x comes to rest.
    lower_lr
        alpha: the step of y.
    nu
        The step of z, below 2 over the largest eigenvalue of the lower problem's Hessian.
    beta
        Momentum of x.
    interval
        y is refreshed every so many steps of x.
    inner_steps
        SGD steps of y in a refresh.
    init_steps
        SGD steps that refine y at first.
    """

    eta: float = 0.01
    decay: Literal["constant", "sqrt"] = "constant"
    lower_lr: float = 0.5
    nu: float = 0.01
    beta: float = 0.9
    interval: int = 2
    inner_steps: int = 3
    init_steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("eta", "lower_lr"):
            number(field, getattr(self, field), "a positive number", above=0.0)
        choice("decay", self.decay, ("constant", "sqrt"))
        number("nu", self.nu, "a number of at least 0", least=0.0)
        number("beta", self.beta, "in [0, 1)", least=0.0, below=1.0)
        whole_number("interval", self.interval, 1)
        whole_number("inner_steps", self.inner_steps, 0)
        whole_number("init_steps", self.init_steps, 0)
        unused(type(self).__name__, "server_lr", self.server_lr, 1.0, ", its step is eta")

    def begin_round(self, server_round: int, registered: Iterable[int]) -> None:
        """Open a round with nothing folded."""
        super().begin_round(server_round, registered)
        self._total = 0.0

    def fold(self, reply: Reply) -> float:
        """Add the reply's vector with its weight p_k."""
        weight = self.alpha(reply)
        self._total += weight
        self.sum.add(reply.update, weight, largest=reply.peak)
        return weight

    def normaliser(self) -> float:
        """Return the participants' total weight."""
        return self._total

    def length(self, step: int) -> float:
        """Return the length of step ``step`` of x, counted from 1."""
        return float(self.eta / step**0.5) if self.decay == "sqrt" else self.eta


@register("bo-rep", "strategy", "2401.09587")
@dataclass(kw_only=True)
class BORep(Bilevel):
    """Clients send hypergradients, the server steps the shared representation by normalised momentum.

    normalize
        False steps along m itself, for comparison; ``clip`` then bounds the length of m.
    clip
        Largest length of m that an unnormalised step is taken along; None bounds nothing.
    """

    normalize: bool = True
    clip: float | None = None

    state_names: ClassVar[tuple[str, ...]] = ("momentum",)
    local_updates: ClassVar[tuple[str, ...]] = ("bo-rep",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is not None:
            number("clip", self.clip, "a positive number", above=0.0)
            unused("BO-REP with clip", "normalize", self.normalize, False)

    def setup(self) -> None:
        """Start with m = 0."""
        self.momentum = array_namespace(self.x).zeros_like(self.x)

    def select(self, server_round: int, available: Sequence[int]) -> dict[int, Instruction]:
        """Ask everyone for a hypergradient; y is refreshed in steps 0, I, 2 I, ..."""
        config: dict[str, Scalar] = {
            keys.REFRESH: (server_round - 1) % self.interval == 0,
            keys.INTERVAL: self.interval,
            keys.INNER_STEPS: self.inner_steps,
            keys.INIT_STEPS: self.init_steps,
            keys.LOWER_LR: self.lower_lr,
            keys.NU: self.nu,
        }
        return dict.fromkeys(available, Instruction("bo-rep", config=config, reply="gradient"))

    def finish(self, server_round: int) -> Any:
        """Step along the momentum; nobody came, or m = 0: no move."""
        if not self._total:
            return self.x
        xp = array_namespace(self.x)
        h = self.sum.drain(self._total)
        momentum = self.beta * self.momentum + (1 - self.beta) * h
        length = norm(momentum)
        self.momentum = xp.astype(momentum, self.x.dtype)
        if length == 0.0:
            return self.x
        scale = 1.0 / length if self.normalize else 1.0
        if self.clip is not None:
            scale = min(1.0, self.clip / length)
        return self.step(momentum * (-self.length(server_round) * scale))

    def diagnostics(self) -> dict[str, float]:
        """The norm of the momentum: how steep the upper problem is."""
        return {"momentum-norm": norm(self.momentum)}


def norm(vector: Any) -> float:
    """Return the Euclidean norm in float64, summed in halves: the same bits on NumPy and torch."""
    xp = array_namespace(vector)
    squares = xp.astype(vector, xp.float64) ** 2
    while squares.shape[0] > 1:
        half = squares.shape[0] // 2
        squares = xp.concat((squares[:half] + squares[half : 2 * half], squares[2 * half :]))
    return math.sqrt(float(squares[0])) if squares.shape[0] else 0.0
