"""What a local update is written against: one client's work in one round, or that of many at once.

A vector of one client has shape (P,). For C clients at once it has shape (C, P), or (P,) where it is the same
for all; a number that differs between clients has shape (C, 1). Formulas that are the same for each element
of a vector hold for both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import Array, ArrayRecord, ConfigRecord
from torch import Tensor

from turnout.client.options import TrainOptions
from turnout.client.training_parts import TrainingParts
from turnout.tasks.task import AdmmSolver, Vector
from turnout.tasks.validation import check_number
from turnout.wire.errors import ConfigError


@dataclass(slots=True)
class Outcome:
    """What a local update sends back: named vectors, and the mean loss it saw on its way.

    The model is the vector "arrays". Tensors are copied before they are sent, ndarrays are not. ``metrics``
    are further numbers to send beside those of every reply. ``records`` are no vectors of the model's size;
    they are sent as they are. ``codes`` are what travels in the place of the model's tensors, by offset.
    """

    vectors: dict[str, Tensor | Vector]
    train_loss: float | Vector
    metrics: dict[str, float] = field(default_factory=dict)
    records: dict[str, ArrayRecord] = field(default_factory=dict)
    codes: dict[int, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Descent:
    """How a local training went: number of steps and mean loss over the minibatches, each before its step."""

    steps: int | Tensor
    train_loss: float | Vector


class WorkModel(Protocol):
    """The model under work: ``parameters`` and ``gradient``, and how vectors get in and out."""

    parameters: Tensor
    gradient: Tensor

    @property
    def frozen(self) -> Sequence[slice]:
        """Pieces of the vector that are not trained."""

    @property
    def size(self) -> int:
        """P, the number of parameters of one model."""

    def train(self, mode: bool) -> None:
        """Put the model in training mode, or in evaluation mode (batch norm uses its stored statistics)."""

    def load_vector(self, vector: Vector) -> None:
        """Copy ``vector`` into the parameters."""

    def tensor(self, vector: Vector) -> Tensor:
        """Return ``vector`` as a new tensor beside the parameters (same device and dtype)."""

    def vector(self) -> Vector:
        """Return a copy of the parameters."""


class WorkState(Protocol):
    """What clients keep between rounds, see `ClientState`."""

    @property
    def last_round(self) -> int | None:
        """The round of the last `save`, None before the first one (of this run)."""

    def load(self, size: int) -> dict[str, Vector]:
        """Return the saved vectors by name, read-only; empty before the first `save` (of this run)."""

    def save(self, vectors: Mapping[str, Vector]) -> None:
        """Replace the saved vectors; the caller must not change them afterwards."""


class Work(ABC):
    """Everything a local update works with: the request, the model, the data, the state.

    ``model`` holds the received global model; a local update may change it freely.
    """

    server_round: int
    local_update: str
    options: TrainOptions
    lr: float
    config: ConfigRecord
    model: WorkModel
    state: WorkState

    def number(self, key: str, *, positive: bool = False) -> float:
        """Return the number ``key`` of the request; `ConfigError` if missing or out of range."""
        if key not in self.config:
            raise ConfigError(
                f"local update {self.local_update!r} needs {key!r} in the request's config; "
                "the strategy must send it."
            )
        value = self.config[key]
        check_number(key, value, low=0, open_low=positive)
        assert isinstance(value, (int, float))
        return float(value)

    def flag(self, key: str) -> bool:
        """Return whether the request sets ``key``."""
        return bool(self.config.get(key, False))

    def needed(self, key: str) -> Tensor:
        """Return the request's record ``key`` as a tensor, shape (P,); `ConfigError` when there is none."""
        vector = self.extra(key)
        if vector is None:
            raise ConfigError(
                f"local update {self.local_update!r} needs the record {key!r}; the strategy must send it."
            )
        return self.model.tensor(vector)

    def require_plain_sgd(self) -> None:
        """Raise `ConfigError` unless steps are plain SGD, which this local update's formula assumes."""
        if not self.options.plain_sgd:
            raise ConfigError(
                f"local update {self.local_update!r} is defined by plain SGD steps, but optimizer="
                f"{self.options.optimizer!r} and momentum={self.options.momentum}; use optimizer='sgd' and "
                "momentum=0."
            )

    @property
    @abstractmethod
    def who(self) -> str:
        """The client or clients, for messages."""

    @abstractmethod
    def extra(self, key: str) -> Vector | None:
        """Return the request's record ``key`` as a vector, shape (P,), or None when there is none."""

    @abstractmethod
    def received(self) -> Tensor:
        """Return the received model, shape (P,): a copy, taken before ``model`` changes."""

    @abstractmethod
    def batches(self, server_round: int | None = None) -> Iterable[Any]:
        """Yield minibatches of one local training, ordered as in ``server_round`` (None: the request's)."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """Return the mean loss on a batch, for each client that has one."""

    def probe(self, batch: Any) -> Tensor:
        """Return the mean loss on a batch in evaluation mode, for one client."""
        raise NotImplementedError

    @abstractmethod
    def gradient(self, batch: Any) -> Tensor:
        """Put the gradient of the mean loss on a batch into ``model.gradient``; return that loss."""

    @abstractmethod
    def large_batch_gradient(self, size: int | None = None) -> float | Vector:
        """Put the mean gradient over ``size`` random examples into ``model.gradient``; return the loss.

        Over all examples when ``size`` is None or not below their number.
        """

    @abstractmethod
    def stepping(self, vector: Tensor) -> Tensor:
        """Return the part of ``vector`` whose clients have the present batch; all of it for one client."""

    @abstractmethod
    def mean_loss(self, losses: list[Tensor]) -> float | Vector:
        """Return the mean of the losses of successive batches."""

    @abstractmethod
    def descend(
        self,
        *,
        centre: Tensor | None = None,
        rho: float = 0.0,
        linear: Tensor | None = None,
        server_round: int | None = None,
    ) -> Descent:
        """Descend in place from the present parameters y on ``f(y) - <linear, y> + rho/2 ||y - centre||^2``.

        Takes the configured number of steps or epochs. Without ``centre`` there is no proximal term, without
        ``linear`` no linear one. Minibatches are ordered as in ``server_round`` (None: the request's).
        """

    @abstractmethod
    def start_parts(self, server_round: int | None = None) -> TrainingParts:
        """Open a local training for the parts of the model that have a say in it, and return them."""

    @abstractmethod
    def admm_solver(self, rho: float) -> AdmmSolver | None:
        """Return the exact proximal steps of the client's objective, or None when there are none."""

    @abstractmethod
    def whole_loss(self, vector: Vector) -> float:
        """Return the loss of the model ``vector`` on all of the client's examples."""
