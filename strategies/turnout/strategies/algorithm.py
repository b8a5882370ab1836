"""What a strategy is without messages: an algorithm over flat vectors with explicit, serialisable state.

A subclass is the paper's algorithm: `fold` for one reply and `finish` for the round's new model, with
`select` where clients get different work. The same object is driven by messages (`StreamingStrategy`) or
directly, vector by vector, on NumPy or torch.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from turnout.strategies.array_api import array_namespace
from turnout.strategies.checks import choice, number, whole_number
from turnout.strategies.clients import ClientRegistry
from turnout.strategies.exact_sum import ExactSum, peak
from turnout.strategies.rounds import ClientReport, Instruction, Reply
from turnout.wire import CheckpointError, ConfigError

log = logging.getLogger("turnout.strategies")


@dataclass(kw_only=True)
class Algorithm(ABC):
    """Base class of the algorithms; its fields are common to all of them.

    num_clients
        N, the number of clients in the federation; None counts every client ever registered.
    server_lr
        Server learning rate: the factor on the aggregated update.
    client_weights
        The objective's client weights alpha_i: ``"uniform"`` (1/N) or ``"examples"`` (n_i / n).
    seed
        Seeds every random choice of the server.
    """

    num_clients: int | None = None
    server_lr: float = 1.0
    client_weights: Literal["uniform", "examples"] = "uniform"
    seed: int = 0

    #: Attributes that form the algorithm's state: vectors, numbers, or objects with ``state_dict``.
    state_names: ClassVar[tuple[str, ...]] = ()

    #: The local updates that clients may be asked for: settings of theirs that do not fit are refused early.
    local_updates: ClassVar[tuple[str, ...]] = ("sgd",)

    def __post_init__(self) -> None:
        whole_number("num_clients", self.num_clients, 1, optional=True)
        number("server_lr", self.server_lr, "a positive number", above=0.0)
        choice("client_weights", self.client_weights, ("uniform", "examples"))
        whole_number("seed", self.seed, 0)
        self.clients = ClientRegistry(self.num_clients)
        self.reports: list[ClientReport] = []
        self.seconds: dict[str, float] = {}
        self.x: Any = None

    # --- the algorithm ---------------------------------------------------------------------------------

    def setup(self) -> None:
        """Create the algorithm's state; ``self.x`` holds the initial model, shape (P,)."""

    def select(self, server_round: int, available: Sequence[int]) -> dict[int, Instruction]:
        """Return the cohort: what each chosen node is asked to do. Default: all available, plain SGD."""
        everyone = Instruction()
        return dict.fromkeys(available, everyone)

    def check(self, reply: Reply) -> None:
        """Raise `ReplyRejected` if ``reply`` lacks what the algorithm needs; nothing has been folded yet."""

    @abstractmethod
    def fold(self, reply: Reply) -> float:
        """Fold one reply into the round and return its weight, to be divided by `normaliser`."""

    @abstractmethod
    def finish(self, server_round: int) -> Any:
        """Return the new global model from what was folded, which may be nothing."""

    def normaliser(self) -> float:
        """Return what the weighted sum is divided by. Default: the objective's total weight (N, or n)."""
        by_examples = self.client_weights == "examples"
        total = self.clients.total_examples() if by_examples else float(len(self.clients))
        return total or 1.0  # No client was ever there: nothing is divided by it.

    def broadcast(self) -> Any:
        """Return the vector that clients receive. Default: the global model."""
        return self.x

    def diagnostics(self) -> dict[str, float]:
        """Return scalars about the round just finished, by kebab-case name."""
        return {}

    def alpha(self, reply: Reply) -> float:
        """Return the objective's weight of this client before normalisation: 1, or its examples."""
        return float(reply.num_examples) if self.client_weights == "examples" else 1.0

    def step(self, direction: Any) -> Any:
        """Return ``x + server_lr * direction`` in the model's precision; ``direction`` is used up."""
        if self.server_lr != 1.0:
            direction *= self.server_lr
        direction += self.x
        return array_namespace(self.x).astype(direction, self.x.dtype)

    def rng(self, server_round: int, purpose: int = 0) -> np.random.Generator:
        """Return a generator that depends on the seed, the round and the purpose only."""
        return np.random.default_rng([self.seed, server_round, purpose])

    # --- a round, without messages ---------------------------------------------------------------------

    def prepare(self, vector: Any) -> None:
        """Start from the model ``vector`` (shape (P,)), with empty state."""
        self.x = vector
        self.clients = ClientRegistry(self.num_clients)
        self.sum = ExactSum(vector)
        self.setup()

    def begin_round(self, server_round: int, registered: Iterable[int]) -> None:
        """Open a round; ``registered`` are all nodes the engine knows, present or not."""
        self.sum.reset()
        self.reports = []
        self._weights: list[tuple[ClientReport, float]] = []
        new = self.clients.register(registered, server_round)
        if new:
            self.on_register(new, server_round)
        known = self.clients.registered
        if self.num_clients is not None and server_round == 1 and known > self.num_clients:
            raise ConfigError(
                f"num_clients={self.num_clients}, but {known} clients are registered; "
                "raise it or leave it out."
            )

    def on_register(self, rows: int | range, server_round: int) -> None:
        """Note new clients (one row, or many) before the round in which they first could take part."""

    def accept(self, server_round: int, reply: Reply) -> ClientReport:
        """Fold one reply and keep the books; raise `ReplyRejected` if the algorithm cannot use it."""
        self.check(reply)
        staleness = self.clients.seen(reply.client, server_round, reply.num_examples)
        report = ClientReport(
            self.clients.key(reply.client),
            "ok",
            num_examples=reply.num_examples,
            staleness=staleness,
            role=reply.role,
        )
        started = time.perf_counter()
        self._weights.append((report, self.fold(reply)))
        self.seconds["fold"] = self.seconds.get("fold", 0.0) + time.perf_counter() - started
        self.reports.append(report)
        return report

    def end_round(self, server_round: int) -> Any:
        """Close the round and return the new model.

        A model with a non-finite value is refused: the old one stays and an error is logged.
        """
        total = self.normaliser()
        for report, weight in self._weights:
            report.weight = weight / total if total else float("nan")
        new = self.finish(server_round)
        if math.isfinite(peak(new)):
            self.x = new
        else:
            log.error("round %d: the new model is not finite; the old one is kept.", server_round)
        return self.x

    # --- checkpoints -----------------------------------------------------------------------------------

    def keep_rows(self, directory: Path, run: str) -> None:
        """Let checkpoints refer to per-client vectors in files in ``directory`` instead of copying them.

        Only for who owns the run (named ``run``) and its checkpoints, and says which of them may still be
        resumed from (`RowReference.forget_older`).
        """
        for name in self.state_names:
            part = getattr(self, name)
            if hasattr(part, "keep_in"):
                part.keep_in(directory, name, run)

    def state_dict(self) -> dict[str, Any]:
        """Return model, client register and the algorithm's state as a tree for `save_checkpoint`."""
        state: dict[str, Any] = {}
        for name in self.state_names:
            part = getattr(self, name)
            if hasattr(part, "state_dict"):
                state[name] = part.state_dict()
            else:
                state[name] = np.asarray(part) if hasattr(part, "shape") else part
        return {
            "strategy": type(self).__name__,
            "x": np.asarray(self.x),
            "clients": self.clients.state_dict(),
            "state": state,
        }

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Continue from a tree of `state_dict`; call `prepare` first.

        Raises `CheckpointError` when the tree is of another strategy or another model.
        """
        if tree["strategy"] != type(self).__name__:
            raise CheckpointError(
                f"checkpoint is of strategy {tree['strategy']}, this run uses {type(self).__name__}."
            )
        if tree["x"].shape != self.x.shape:
            raise CheckpointError(
                f"checkpoint holds a model of {tree['x'].size} parameters, this run's has {self.x.size}."
            )
        missing = [name for name in self.state_names if name not in tree["state"]]
        if missing:
            raise CheckpointError(
                f"checkpoint holds no {missing[0]!r} of {tree['strategy']}: another version of it wrote the "
                "checkpoint; resume with that version, or start anew."
            )
        self.x = np.array(tree["x"])
        self.clients.load_state_dict(tree["clients"])
        for name in self.state_names:
            part, stored = getattr(self, name), tree["state"][name]
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(stored)
            else:
                setattr(self, name, np.array(stored) if isinstance(stored, np.ndarray) else stored)

    def memory_bytes(self) -> int:
        """Return the bytes of the algorithm's state: per-client memories, and vectors beside the model."""
        parts = (getattr(self, name) for name in self.state_names)
        return sum(part.nbytes for part in parts if isinstance(getattr(part, "nbytes", None), int))
