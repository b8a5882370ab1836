"""EGGROLL: evolution strategies with low-rank perturbations, federated (arXiv 2511.16652).

Clients only run forward passes: for each of their pairs j, whose perturbation E_j follows from a seed, they
send ``d_j = F(theta + sigma E_j) - F(theta - sigma E_j)``. The server takes
``g = sum_kj p_k d_kj / (2 sigma P_k) E_j`` and moves ``theta <- theta + lr g`` (or by momentum or Adam). It
broadcasts the weights of the pairs and every client repeats the step, so that neither way grows with the
model. The paper has one population on one cluster; seeds and scalars over a network are this project's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from turnout.strategies.checks import choice, number, unused, whole_number
from turnout.strategies.pair_scores import PairScores
from turnout.strategies.replicas import Replicas
from turnout.strategies.rounds import Instruction, Reply
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import ConfigError, LayoutError, ReplyRejected, keys, register
from turnout.wire.perturbation import NOISES, NoiseName, on_grid
from turnout.wire.replica import Base, Replica, Search
from turnout.wire.seed_log import Fitness


@register("eggroll", "strategy", "2511.16652")
@dataclass(kw_only=True)
class EGGROLL(StreamingStrategy):
    """Gradient-free training of 20 + 4 ``pairs`` bytes up per client and round, whatever the model's size.

    ``server_lr`` is the learning rate on the textbook estimate; tune it together with sigma, and anew for
    each rank.

    sigma
        Size of the perturbations.
    rank
        Rank r of a matrix's perturbation; None perturbs every matrix by full-rank noise.
    pairs
        Antithetic pairs that each client evaluates in a round: two forward passes over one minibatch each.
    mode
        ``"shared"``: all clients evaluate the same pairs, which keeps the differences between their data out
        of the estimate. ``"disjoint"``: each has its own, hence more directions in total.
    fitness
        The task's metric to raise; a minus sign in front of one to lower. It need not be differentiable:
        ``"accuracy"``.
    noise
        ``"gaussian"`` or ``"rademacher"`` (signs: the same on every version of NumPy).
    base, momentum, beta1, beta2, weight_decay
        The server's optimizer: ``"sgd"`` with ``momentum``, or ``"adam"``. A client that joins late also
        receives its moments. ``weight_decay`` is decoupled.
    freeze_1d
        Leave biases and other vectors as they are.
    fitness_shaping
        None, or ``"sign"``: of each difference only the sign counts, and travels as one bit: 20 +
        ``pairs`` / 8 bytes up. The learning rate is another one, as with ``normalise``.
    normalise
        Divide a round's differences by the root of their mean square.
    clip
        Differences are clipped to plus or minus this, by clients and again by the server.
    checksum_every
        Rounds between checks that clients hold the server's model; one that does not gets it anew.
    known_start
        Clients build the initial model themselves from the task's seed. One that ends up with another says so
        and gets it in the next round.
    """

    server_lr: float = 0.03
    client_weights: Literal["uniform", "examples"] = "examples"
    sigma: float = 0.02
    rank: int | None = 1
    pairs: int = 20
    mode: Literal["shared", "disjoint"] = "shared"
    fitness: str = "-loss"
    noise: NoiseName = "rademacher"
    base: Base = "sgd"
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    freeze_1d: bool = False
    fitness_shaping: Literal["sign"] | None = None
    normalise: bool = False
    clip: float = 10.0
    checksum_every: int = 10
    known_start: bool = True

    state_names: ClassVar[tuple[str, ...]] = ("moments", "steps", "replicas")
    local_updates: ClassVar[tuple[str, ...]] = ("eggroll",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, default in (("carried_vectors", ()), ("max_update_norm", None)):
            unused("EGGROLL", name, getattr(self, name), default)
        number("sigma", self.sigma, "a positive number", above=0.0)
        whole_number("rank", self.rank, 1, optional=True)
        whole_number("pairs", self.pairs, 1)
        whole_number("checksum_every", self.checksum_every, 1)
        number("clip", self.clip, "a positive number", above=0.0)
        number("weight_decay", self.weight_decay, "a number of at least 0", least=0.0)
        for name in ("momentum", "beta1", "beta2"):
            number(name, getattr(self, name), "a number in [0, 1)", least=0.0, below=1.0)
        for name, allowed in (
            ("mode", ("shared", "disjoint")),
            ("noise", NOISES),
            ("fitness_shaping", (None, "sign")),
            ("base", ("sgd", "adam")),
        ):
            choice(name, getattr(self, name), allowed)
        if not self.fitness.removeprefix("-"):
            raise ConfigError(f"fitness must name a metric, as '-loss' or 'accuracy', got {self.fitness!r}.")

    @property
    def search(self) -> Search:
        """What clients need to know of these settings."""
        same = ("base", "beta1", "beta2", "weight_decay", "seed", "sigma", "noise", "freeze_1d")
        momentum = self.momentum if self.base == "sgd" else 0.0
        return Search(
            lr=self.server_lr,
            rank=self.rank or 0,
            momentum=momentum,
            **{name: getattr(self, name) for name in same},
        )

    @property
    def folds_cohorts(self) -> bool:
        """False: replies are no vectors, so they come as messages."""
        return False

    def setup(self) -> None:
        """Start with zero moments, an empty log, and nobody holding a model."""
        search = self.search
        replica = Replica.begin(search, search.source(self.layout), self.x)
        self.moments: Any = np.stack(replica.moments) if replica.moments else np.empty((0, self.x.size))
        self.steps = 0
        self._source, self._search = replica.source, search
        self.replicas = Replicas(replica, known_start=self.known_start)

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Continue from a tree of `state_dict`."""
        super().load_state_dict(tree)
        self.replicas.adopt(self.x)

    def begin_round(self, server_round: int, registered: Iterable[int]) -> None:
        """Open a round."""
        super().begin_round(server_round, registered)
        self.replicas.begin_round(self.x)
        self._round, self._scores = server_round, PairScores()

    def select(self, server_round: int, available: Sequence[int]) -> dict[int, Instruction]:
        """Give everyone its pairs, and what its replica lacks: the rounds since, or the model if smaller."""
        self._pairs = self.pairs * (len(available) if self.mode == "disjoint" else 1)
        same: dict[tuple[int | None, int], Instruction] = {}
        cohort = {}
        for position, node in enumerate(sorted(available)):
            first = self.pairs * position if self.mode == "disjoint" else 0
            since = self.replicas.known_since(self.clients.row_of_node(node), server_round)
            if (since, first) not in same:
                told = same[since, first] = self._instruction(first)
                self.replicas.bring(told, since, server_round, self.moments)
            cohort[node] = same[since, first]
        return cohort

    def _instruction(self, first: int) -> Instruction:
        config = {
            **self._search.to_config(),
            keys.PAIRS: self.pairs,
            keys.FIRST_PAIR: first,
            keys.FITNESS_METRIC: self.fitness,
            keys.CLIP: self.clip,
        }
        if self.fitness_shaping:
            config[keys.FITNESS_SHAPING] = self.fitness_shaping
        return Instruction("eggroll", config, reply="records", extras=(keys.FITNESS,))

    def check(self, reply: Reply) -> None:
        """Refuse what does not answer the pairs that were asked for, or is not finite."""
        try:
            said = Fitness.read(reply.records[keys.FITNESS])
        except LayoutError as error:
            raise ReplyRejected("wrong-layout", str(error)) from error
        assert reply.told is not None
        first, count = reply.told.config[keys.FIRST_PAIR], 0 if said.resync else self.pairs
        client = self.clients.key(reply.client) % 2**32
        signs = self.fitness_shaping == "sign" and not said.resync
        wanted = (self._round, client, first, count, self._search.digest, signs)
        if said.about != wanted:
            raise ReplyRejected(
                "wrong-pairs",
                "the reply is about (round, client, first pair, pairs, settings, signs) "
                f"{said.about}, asked was {wanted}.",
            )
        if not np.isfinite(said.differences).all():
            raise ReplyRejected("non-finite", "a fitness difference is NaN or infinite.")

    def fold(self, reply: Reply) -> float:
        """Keep the client's differences, to be weighed when all are in; a client without a model has none."""
        said = Fitness.read(reply.records[keys.FITNESS])
        self.replicas.answered(reply.client, self._round, resync=said.resync)
        if said.resync:
            return 0.0
        weight = self.alpha(reply)
        clipped = np.clip(said.differences, -self.clip, self.clip)
        self._scores.add(reply.client, weight, said.first_pair, clipped)
        return weight

    def normaliser(self) -> float:
        """Return the total weight of those who sent differences."""
        return self._scores.total

    def finish(self, server_round: int) -> Any:
        """Move by the weighted pairs and log them; nobody came, or no finite model: nothing moves."""
        rms, scale = self._scores.rms, 1.0 / (2.0 * self.sigma * self.pairs)
        if self.normalise and rms > 0.0:
            scale /= rms
        weights = on_grid(self._scores.weights(self._pairs, scale), self._source.rank)
        before = Replica(self._search, self._source, self.x, list(self.moments), self.steps)
        after = before.moved(server_round, weights)
        if not after.finite:
            after, weights = before, weights[:0]
        if after.moments:
            self.moments = np.stack(after.moments)
        self.steps = after.steps
        self.replicas.moved(server_round, weights, after, checked=server_round % self.checksum_every == 0)
        return after.theta

    def diagnostics(self) -> dict[str, float]:
        """RMS and peak of the differences, models sent whole, and the bytes of the log that is kept."""
        return {
            "rms-difference": self._scores.rms,
            "peak-difference": self._scores.largest(),
            "checkpoints-sent": float(self.replicas.models_sent),
            "seed-log-bytes": float(self.replicas.nbytes),
        }
