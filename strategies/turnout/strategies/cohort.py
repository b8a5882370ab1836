"""A round in bulk: one request for a whole cohort, and replies that come many at a time.

An engine in the strategy's own process can train without a message per client. Such a grid has
``trains_cohorts`` (whether it can now) and ``train_cohort(cohort, timeout=...)``, a generator of `Batch`.
What is folded is the same, to the bit, as from messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from flwr.app import RecordDict

from turnout.strategies.rounds import Instruction
from turnout.wire import NDArray, ParameterLayout, ReplyRejected

if TYPE_CHECKING:
    from collections.abc import Generator


@dataclass(frozen=True, slots=True)
class CohortPart:
    """The nodes that got one instruction, and the request's content that they share."""

    content: RecordDict
    instruction: Instruction
    nodes: list[int]


@dataclass(frozen=True, slots=True)
class Cohort:
    """What one round asks; ``sent`` is the broadcast vector, shape (P,), that updates are relative to."""

    server_round: int
    layout: ParameterLayout
    sent: NDArray
    parts: list[CohortPart]


@dataclass(slots=True)
class Batch:
    """Checked replies of k clients to one instruction, and clients without one.

    ``vectors``, shape (k, P), holds what ``instruction.reply`` says; ``peaks`` and ``norms`` its rows'
    largest absolute values and Euclidean norms; ``extras`` and ``buffers`` have k rows each. All arrays are
    lent until the next batch is asked for.
    """

    instruction: Instruction
    nodes: Sequence[int]
    vectors: NDArray
    peaks: Sequence[float]
    norms: Sequence[float]
    examples: Sequence[int]
    losses: Sequence[float]
    seconds: Sequence[float]
    extras: Mapping[str, NDArray] = field(default_factory=dict)
    buffers: Mapping[str, NDArray] = field(default_factory=dict)
    failures: Sequence[tuple[int, ReplyRejected]] = ()

    @classmethod
    def of_failures(
        cls, instruction: Instruction, cohort: Cohort, failures: Sequence[tuple[int, ReplyRejected]]
    ) -> Batch:
        """Return a batch of clients without a reply."""
        return cls(
            instruction,
            [],
            cohort.sent[:0].reshape(0, cohort.sent.size),
            [],
            [],
            [],
            [],
            [],
            failures=failures,
        )


@runtime_checkable
class CohortGrid(Protocol):
    """An engine that can train a cohort in bulk."""

    @property
    def trains_cohorts(self) -> bool:
        """Whether `train_cohort` can be used, with this engine's clients and settings."""

    def train_cohort(self, cohort: Cohort, *, timeout: float | None = None) -> Generator[Batch, None, None]:
        """Train the clients of ``cohort`` and yield their replies as they complete."""
