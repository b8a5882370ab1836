"""Trains the clients of one part of a cohort together, as one tensor program."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, RecordDict

from turnout.simulation.clients import LocalClients, failure
from turnout.simulation.cohort_trainer import CLIENT_RAISED, CohortTrainer, PartWork, ReplyTable
from turnout.strategies.measure import measured_rows
from turnout.wire import ReplyRejected, keys
from turnout.wire.flower import records_of
from turnout.wire.record_tree import isolated

if TYPE_CHECKING:
    from turnout.client.app import Trainer
    from turnout.client.batched import CohortOutcome, CohortWork

_log = logging.getLogger(__name__)


class BatchedCohortTrainer(CohortTrainer):
    """Many clients at once; what cannot be done so is done one client after the other, and said once."""

    def __init__(self, clients: LocalClients, trainer: Trainer) -> None:
        super().__init__(clients, trainer)
        from turnout.client.batched import BatchedTrainer

        self.batched = BatchedTrainer(trainer.task, trainer.options)
        self._told: set[str] = set()

    def ordered(self, nodes: Sequence[int]) -> Sequence[int]:
        """Return the clients with many examples first, so that like ones are trained together."""
        return sorted(nodes, key=self._num_examples, reverse=True)

    def _num_examples(self, node: int) -> int:
        try:
            return self._trainer.task.num_examples(node)
        except Exception:  # Its training will tell, as that client's failure.
            return 0

    def least(self, work: PartWork, nodes: Sequence[int]) -> int:
        """Return how many clients are trained at once."""
        if self.batched.refusal(work.instruction.local_update) is not None:
            return 1
        try:
            return self.batched.at_once(nodes[0])
        except Exception:  # Client 0 of these has no usable data: its training will tell.
            return 1

    def train(
        self,
        work: PartWork,
        nodes: Sequence[int],
        states: Mapping[int, RecordDict],
        table: ReplyTable,
        deadline: float | None = None,
    ) -> None:
        """Fill ``table`` as `CohortTrainer.train` does, up to rounding; the deadline is looked at first."""
        reason = self.batched.refusal(work.instruction.local_update)
        if reason is not None:
            if reason not in self._told:
                self._told.add(reason)
                _log.warning("clients are trained one after the other: %s", reason)
            super().train(work, nodes, states, table, deadline)
            return
        if deadline is not None and time.monotonic() > deadline:
            return
        before = {node: isolated(states[node]) for node in nodes if states[node]}
        started = time.perf_counter()
        try:
            outcome = self._together(work, nodes, states, table)
            failures = {nodes[position]: error for position, error in outcome.failures.items()}
        except Exception as wrong:
            failures = dict.fromkeys(nodes, wrong)
        elapsed = (time.perf_counter() - started) / len(nodes)
        for node, error in failures.items():
            states[node].clear()
            states[node].update(before.get(node, {}))
            table.failures.append(
                (node, ReplyRejected(CLIENT_RAISED, failure(node, work.server_round, error)))
            )
        if len(failures) < len(nodes):
            self._collect(work, nodes, outcome, table, elapsed)

    def _together(
        self, work: PartWork, nodes: Sequence[int], states: Mapping[int, RecordDict], table: ReplyTable
    ) -> CohortOutcome:
        from turnout.client.state import ClientState

        cohort = self._cohort(work)
        kept = [ClientState(states[node], cohort.local_update, work.server_round) for node in nodes]
        return self.batched.train(cohort, nodes, kept, table.rows[: len(nodes)])

    def _cohort(self, work: PartWork) -> CohortWork:
        from turnout.client.batched import CohortWork

        asked = self._trainer.asked(work.content)
        vectors = {
            name: work.layout.flatten(record, with_buffers=False)
            for name, record in records_of(work.content, ArrayRecord).items()
            if name != keys.ARRAYS
        }
        return CohortWork(asked.server_round, asked.local_update, asked.lr, asked.config, work.sent, vectors)

    def _collect(
        self,
        work: PartWork,
        nodes: Sequence[int],
        outcome: CohortOutcome,
        table: ReplyTable,
        elapsed: float,
    ) -> None:
        """Check the trained rows and close the gaps that failed clients leave."""
        minus = work.sent if work.instruction.reply == "update" else None
        count = len(nodes)
        peaks, norms, refused = measured_rows(table.rows[:count], minus, work.reply_record)
        for extra, rows in table.extras.items():
            rows[:count] = outcome.extras[extra]
            refused |= measured_rows(rows[:count], None, extra)[2]
        good = [i for i in range(count) if i not in refused and i not in outcome.failures]
        table.failures += [(nodes[i], error) for i, error in refused.items() if i not in outcome.failures]
        if len(good) < count:
            for rows in (table.rows, *table.extras.values()):
                rows[: len(good)] = rows[good]
        table.nodes += [nodes[i] for i in good]
        task = self._trainer.task
        numbers = table.numbers[: len(good)]
        numbers[:, 0] = [task.num_examples(nodes[i]) for i in good]
        numbers[:, 1], numbers[:, 2] = outcome.losses[good], elapsed
        numbers[:, 3], numbers[:, 4] = peaks[good], norms[good]
