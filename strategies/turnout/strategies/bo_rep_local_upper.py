"""BO-REP with a shared lower level, for data hyper-cleaning (Hao, Gong, Liu, arXiv 2401.09587).

``min_x sum_k p_k f_k(y*(x))``: the classifier y and the vector z travel; x_k, such as one weight per training
example, never leaves its client. Rounds alternate: one refresh, in which y is trained as in FedAvg, then
``interval`` steps with y fixed: ``z <- z - nu sum_k p_k (H_k z - d_y f_k)``, each client's m_k, and
``x_k <- x_k - eta m_k / ||m||`` with the norm over all clients, which tell the server ||m_k||^2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from turnout.strategies.array_api import array_namespace
from turnout.strategies.bo_rep import Bilevel, norm
from turnout.strategies.rounds import Instruction, Reply, Scalar
from turnout.wire import ReplyRejected, keys, register
from turnout.wire.columns import Column

_LARGEST_SQUARE = 1e30


@register("bo-rep-local-upper", "strategy", "2401.09587")
@dataclass(kw_only=True)
class BORepLocalUpper(Bilevel):
    """Clients keep their upper variables; the shared model is the lower level.

    Down: y and z. Up: y in a refresh, else z's residual and one number.
    """

    state_names: ClassVar[tuple[str, ...]] = ("implicit", "norm", "norms", "norm_rounds")
    local_updates: ClassVar[tuple[str, ...]] = ("bo-rep-local-upper",)

    @property
    def folds_cohorts(self) -> bool:
        """Whether replies may come in bulk: a bulk has no metrics of the clients' own."""
        return False

    def setup(self) -> None:
        """Start with z = 0 and no client's momentum known."""
        self.implicit = array_namespace(self.x).zeros_like(self.x)
        self.norms = Column(np.float64)
        self.norm_rounds = Column(np.int64)
        self.norm = 0.0

    def refreshes(self, server_round: int) -> bool:
        """Return whether y is trained in ``server_round``: 1, I + 2, 2 I + 3, ..."""
        return (server_round - 1) % (self.interval + 1) == 0

    def begin_round(self, server_round: int, registered: Iterable[int]) -> None:
        """Open a round with no momentum known."""
        super().begin_round(server_round, registered)
        self._refreshing = self.refreshes(server_round)
        self._squares: dict[int, float] = {}

    def on_register(self, rows: int | range, server_round: int) -> None:
        """Make room for new clients."""
        stop = rows + 1 if isinstance(rows, int) else rows.stop
        self.norms.reach(stop)
        self.norm_rounds.reach(stop)

    def select(self, server_round: int, available: Sequence[int]) -> dict[int, Instruction]:
        """Tell each client the norm of the momenta of the round in which it last gave its own."""
        refresh = self._refreshing
        steps = self.init_steps if server_round == 1 else self.inner_steps
        made: dict[int, Instruction] = {}
        asked = {}
        for node, row in zip(available, self.clients.rows_of(available), strict=True):
            given = int(self.norm_rounds[row])
            if given not in made:
                config: dict[str, Scalar] = {
                    keys.REFRESH: refresh,
                    keys.INNER_STEPS: steps,
                    keys.LOWER_LR: self.lower_lr,
                    keys.BETA: self.beta,
                    keys.BY_EXAMPLES: self.client_weights == "examples",
                    keys.MOMENTUM_ROUND: given,
                    keys.MOMENTUM_NORM: float(self.norms[row]),
                    keys.ETA: self.length(self._steps_until(given)) if given else self.eta,
                }
                vectors = {} if refresh else {keys.IMPLICIT: self.implicit}
                reply: Any = "update" if refresh else "gradient"
                made[given] = Instruction("bo-rep-local-upper", config=config, vectors=vectors, reply=reply)
            asked[node] = made[given]
        return asked

    def _steps_until(self, server_round: int) -> int:
        """Return how many rounds up to ``server_round`` were steps."""
        return server_round - 1 - (server_round - 1) // (self.interval + 1)

    def check(self, reply: Reply) -> None:
        """Refuse a step's reply without the squared norm of its momentum."""
        if not self._refreshing:
            square = reply.metrics.get(keys.MOMENTUM_SQUARE, math.nan)
            if not 0.0 <= square < _LARGEST_SQUARE:
                raise ReplyRejected(
                    "bad-metric",
                    f"metric {keys.MOMENTUM_SQUARE!r} must be a number of at least 0, got {square!r}.",
                )

    def fold(self, reply: Reply) -> float:
        """Add the update of y, or the residual of z."""
        if not self._refreshing:
            self._squares[reply.client] = float(reply.metrics[keys.MOMENTUM_SQUARE])
        return super().fold(reply)

    def finish(self, server_round: int) -> Any:
        """Move y in a refresh, else z; nobody came: nothing moves."""
        if not self._total:
            return self.x
        mean = self.sum.drain(self._total)
        if self._refreshing:
            return self.step(mean)
        self.implicit = array_namespace(self.x).astype(self.implicit - self.nu * mean, self.x.dtype)
        self.norm = math.sqrt(math.fsum(self._squares.values()))  # Rounded once: in any order the same.
        for row in self._squares:
            self.norms[row], self.norm_rounds[row] = self.norm, server_round
        return self.x

    def diagnostics(self) -> dict[str, float]:
        """The norms of the clients' momenta together, and of z."""
        return {
            "momentum-norm": self.norm,
            "implicit-norm": norm(self.implicit),
        }
