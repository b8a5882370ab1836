"""Trains the clients of one part of a cohort and checks what comes out, without a message per client."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from flwr.app import Context, RecordDict

from turnout.simulation.clients import LocalClients, failure
from turnout.strategies.cohort import Batch
from turnout.strategies.measure import check_range, extremes, measured
from turnout.strategies.rounds import Instruction
from turnout.wire import NDArray, ParameterLayout, ReplyRejected, keys
from turnout.wire.record_tree import isolated

if TYPE_CHECKING:
    from turnout.client.app import Trainer

# Columns of the table of numbers that come with a reply.
NUMBERS: Final = ("examples", "loss", "seconds", "peak", "norm")

CLIENT_RAISED: Final = "client-error"

Allocate = Callable[[Any, Sequence[int]], NDArray]


@dataclass(frozen=True, slots=True)
class PartWork:
    """What the clients of one part share: the request's content and what its replies mean."""

    server_round: int
    layout: ParameterLayout
    sent: NDArray
    content: RecordDict
    instruction: Instruction

    @property
    def reply_record(self) -> str:
        """The name of the record that holds a reply's vector."""
        return keys.GRADIENT if self.instruction.reply == "gradient" else keys.ARRAYS


@dataclass(slots=True)
class ReplyTable:
    """Room for the replies of ``capacity`` clients; the first ``count`` rows are filled."""

    rows: NDArray
    numbers: NDArray
    extras: dict[str, NDArray]
    buffers: dict[str, NDArray]
    nodes: list[int] = field(default_factory=list)
    failures: list[tuple[int, ReplyRejected]] = field(default_factory=list)

    @classmethod
    def allocated(cls, work: PartWork, capacity: int, allocate: Allocate) -> ReplyTable:
        """Return an empty table whose arrays ``allocate(dtype, shape)`` makes."""
        layout, instruction = work.layout, work.instruction
        wide = (capacity, layout.size)
        with_buffers = layout.buffers if instruction.reply != "gradient" else ()
        return cls(
            allocate(layout.dtype, wide),
            allocate(np.float64, (capacity, len(NUMBERS))),
            {name: allocate(layout.dtype, wide) for name in instruction.extras},
            {spec.name: allocate(spec.dtype, (capacity, *spec.shape)) for spec in with_buffers},
        )

    def clear(self) -> None:
        """Make room again."""
        self.nodes, self.failures = [], []

    def batch(self, instruction: Instruction) -> Batch:
        """Return the filled rows, in place."""
        count = len(self.nodes)
        columns = dict(zip(NUMBERS, self.numbers[:count].T.tolist(), strict=True))
        return Batch(
            instruction,
            self.nodes,
            self.rows[:count],
            columns["peak"],
            columns["norm"],
            [int(examples) for examples in columns["examples"]],
            columns["loss"],
            columns["seconds"],
            {name: rows[:count] for name, rows in self.extras.items()},
            {name: rows[:count] for name, rows in self.buffers.items()},
            self.failures,
        )


class CohortTrainer:
    """One client after the other, exactly as if each had got a message."""

    def __init__(self, clients: LocalClients, trainer: Trainer) -> None:
        self._clients = clients
        self._trainer = trainer

    def ordered(self, nodes: Sequence[int]) -> Sequence[int]:
        """Return the order in which to hand out ``nodes``."""
        return nodes

    def least(self, work: PartWork, nodes: Sequence[int]) -> int:
        """Return how many clients at a time are worth a job of their own, given them in order."""
        return 1

    def train(
        self,
        work: PartWork,
        nodes: Sequence[int],
        states: Mapping[int, RecordDict],
        table: ReplyTable,
        deadline: float | None = None,
    ) -> None:
        """Fill ``table`` with the replies of ``nodes``; ``states`` holds each one's state and is kept up.

        A client that raises is noted as a failure, its state as it was. Clients not started by
        ``deadline`` are left out.
        """
        for node in nodes:
            if deadline is not None and time.monotonic() > deadline:
                return
            before = isolated(states[node])
            try:
                self._train(work, node, states[node], table)
            except ReplyRejected as refused:
                table.failures.append((node, refused))
            except (Exception, SystemExit) as error:
                # The caller's mapping holds the very object; its content is put back.
                states[node].clear()
                states[node].update(before)
                reason = failure(node, work.server_round, error)
                table.failures.append((node, ReplyRejected(CLIENT_RAISED, reason)))

    def _train(self, work: PartWork, node: int, state: RecordDict, table: ReplyTable) -> None:
        started = time.perf_counter()
        context: Context = self._clients.new_context(node, state)
        update, outcome = self._trainer.update(work.content, context)
        elapsed = time.perf_counter() - started
        index, name = len(table.nodes), work.reply_record
        try:
            minus = work.sent if work.instruction.reply == "update" else None
            peak, norm = measured(_vector(outcome.vectors[name]), minus, table.rows[index], name)
            for extra, rows in table.extras.items():
                measured(_vector(outcome.vectors[extra]), None, rows[index], extra)
            for buffer, rows in table.buffers.items():
                rows[index] = update.model.buffers[buffer].numpy(force=True)
                check_range(buffer, *extremes(rows[index]))
        except KeyError as error:
            raise ReplyRejected("wrong-layout", f"record {error} is missing.") from error
        table.numbers[index] = (len(update.data), outcome.train_loss, elapsed, peak, norm)
        table.nodes.append(node)


def rows_within(work: PartWork, budget: int) -> int:
    """Return how many clients' replies fit into ``budget`` bytes, at least one."""
    width = work.layout.size * work.layout.dtype.itemsize * (1 + len(work.instruction.extras))
    return max(1, budget // max(1, width))


def _vector(value: Any) -> NDArray:
    """Return what a local update sends, a vector or a tensor, as a vector; in place if that is possible."""
    vector: NDArray = value if isinstance(value, np.ndarray) else value.detach().numpy(force=True)
    return vector
