"""All clients of a round as one tensor program in this process, on its device."""

from __future__ import annotations

import time
from collections.abc import Generator

import numpy as np

from turnout.simulation.batched_trainer import BatchedCohortTrainer
from turnout.simulation.clients import LocalClients
from turnout.simulation.cohort_trainer import CLIENT_RAISED, PartWork, ReplyTable, rows_within
from turnout.simulation.executors.serial import SerialExecutor
from turnout.strategies.cohort import Batch, Cohort
from turnout.wire.torch_threads import one_torch_thread

# Memory for the replies of the clients that one call trains.
_BATCH_BYTES = 256 << 20


class BatchedExecutor(SerialExecutor):
    """Trains cohorts together; what comes as messages (evaluation, mods) is run one after the other."""

    def __init__(self, clients: LocalClients, trainer: BatchedCohortTrainer) -> None:
        super().__init__(clients)
        self.trainer = trainer
        self._tables: dict[object, ReplyTable] = {}

    @property
    def trains_cohorts(self) -> bool:
        """True: the app has been looked at."""
        return True

    def train_cohort(self, cohort: Cohort, *, deadline: float | None) -> Generator[Batch, None, None]:
        """Yield one batch per call of the trainer."""
        for part in cohort.parts:
            work = PartWork(cohort.server_round, cohort.layout, cohort.sent, part.content, part.instruction)
            nodes = self.trainer.ordered(part.nodes)
            size = min(self.trainer.batched.chunk(work.layout.size), rows_within(work, _BATCH_BYTES))
            table = self._table(work, size)
            for start in range(0, len(nodes), size):
                if deadline is not None and time.monotonic() > deadline:
                    return
                table.clear()
                chunk = nodes[start : start + size]
                states = {node: self.clients.states.get(node) for node in chunk}
                with one_torch_thread():
                    self.trainer.train(work, chunk, states, table)
                if deadline is not None and time.monotonic() > deadline:
                    return
                for node, state in states.items():
                    self.clients.states.put(node, state)
                raised = sum(refused.reason == CLIENT_RAISED for _, refused in table.failures)
                self.clients.count_failures(raised)
                yield table.batch(part.instruction)

    def _table(self, work: PartWork, size: int) -> ReplyTable:
        key = (work.layout.digest, work.instruction.reply, work.instruction.extras, size)
        if key not in self._tables:
            self._tables[key] = ReplyTable.allocated(work, size, lambda dtype, shape: np.empty(shape, dtype))
        return self._tables[key]
