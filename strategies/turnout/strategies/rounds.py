"""The values a round is made of: what clients are told, what they reply, what is reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Result

    from turnout.strategies.streaming import StreamingStrategy

Scalar = bool | int | float | str
Outcome = Literal["ok", "failed", "rejected", "missing"]


@dataclass(slots=True)
class Instruction:
    """What one client is asked to do.

    ``local_update`` names the client's algorithm, ``config`` its numbers, ``vectors`` further records to send
    (flat vectors of shape (P,)), ``records`` records sent as they are; ``model`` says whether the global
    model is sent. ``reply`` says what the client's vector means to the strategy: ``"update"`` (its model
    minus the one sent), ``"model"`` (its model as it is), ``"gradient"`` (the record ``gradient``), or
    ``"records"``: there is none. ``extras`` names further records that the reply must have, of shape (P,) too
    unless the reply is ``"records"``, when the strategy checks and reads them itself; others are not read.
    """

    local_update: str = "sgd"
    config: dict[str, Scalar] = field(default_factory=dict)
    vectors: dict[str, Any] = field(default_factory=dict)
    reply: Literal["update", "model", "gradient", "records"] = "update"
    extras: tuple[str, ...] = ()
    records: dict[str, ArrayRecord] = field(default_factory=dict)
    model: bool = True


@dataclass(slots=True)
class Reply:
    """One accepted reply, as `StreamingStrategy.fold` receives it.

    ``client`` is the client's row: a small integer, stable over rounds. ``update`` has shape (P,) and is only
    lent: it is overwritten by the next reply. ``peak`` is its largest absolute value. ``vectors`` are the
    further records that the instruction asked for, lent as well; ``metrics`` the scalars that came along, not
    all of them finite. Of a reply of records, ``update`` has no elements and ``records`` are what was asked
    for, unchecked. ``told`` is what the client had been asked.
    """

    client: int
    update: Any
    num_examples: int
    peak: float
    role: str = "sgd"
    vectors: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    records: Mapping[str, ArrayRecord] = field(default_factory=dict)
    told: Instruction | None = None


@dataclass(slots=True)
class ClientReport:
    """What became of one client that was asked in a round.

    ``client`` is its id. ``weight`` is its share of the round's step before the server's learning rate
    (NaN if it had none), ``staleness`` the rounds since it last took part (0 the first time),
    ``update_norm`` the Euclidean norm of its update. ``metrics`` are the scalars that came with the reply.
    An engine that numbers its requests sets ``task`` and ``attempt``, and ``reply_crc32`` to the CRC-32 of
    the reply's arrays as they travelled.
    """

    client: int
    outcome: Outcome
    reason: str = ""
    num_examples: int = 0
    weight: float = float("nan")
    staleness: int = 0
    train_loss: float = float("nan")
    train_seconds: float = float("nan")
    update_norm: float = float("nan")
    role: str = "sgd"
    metrics: Mapping[str, float] = field(default_factory=dict)
    task: int = 0
    attempt: int = 0
    reply_crc32: int | None = None


@dataclass(frozen=True, slots=True)
class RoundReport:
    """Everything observable about one finished round.

    ``seconds`` is by phase: select, train (waiting and folding), fold, finish, evaluate.
    """

    server_round: int
    arrays: ArrayRecord
    train_metrics: dict[str, float]
    evaluate_metrics: dict[str, float]
    diagnostics: dict[str, float]
    clients: list[ClientReport]
    seconds: dict[str, float]
    strategy: StreamingStrategy
    grid: Grid

    def checkpoint(self) -> dict[str, Any]:
        """Return the state from which `StreamingStrategy.start` can resume after this round.

        It shares its arrays with the strategy: save it, or copy it, before the next round.
        """
        tree: dict[str, Any] = {"round": self.server_round, "strategy": self.strategy.state_dict()}
        if hasattr(self.grid, "state_dict"):
            tree["grid"] = self.grid.state_dict()
        return tree


class Callback:
    """Observes a run. Override what you need; an exception ends the run."""

    def on_start(self, strategy: StreamingStrategy, *, num_rounds: int, first_round: int) -> None:
        """Run before the first round; ``first_round`` is above 1 when resuming."""

    def on_round_end(self, report: RoundReport) -> None:
        """Run after each round's evaluation; the round counts as committed when this returns."""

    def on_finish(self, strategy: StreamingStrategy, result: Result) -> None:
        """Run after the last round."""
