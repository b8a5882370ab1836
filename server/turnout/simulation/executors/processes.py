"""Clients in forked worker processes: parameters, states and replies lie in shared memory."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
from flwr.app import Message, RecordDict

from turnout.simulation.clients import LocalClients, reply_id
from turnout.simulation.cohort_trainer import CLIENT_RAISED, CohortTrainer, PartWork, ReplyTable, rows_within
from turnout.simulation.executors.base import Executor
from turnout.simulation.workers.handler import WorkerHandler, describe_part
from turnout.simulation.workers.parcels import Entry, entries
from turnout.simulation.workers.pool import Answer, Job, WorkerPool, WorkersDoNotStartError
from turnout.simulation.workers.states import SharedStates
from turnout.strategies.cohort import Batch, Cohort
from turnout.wire import ReplyRejected
from turnout.wire.flower import CLIENT_APP_RAISED, error_reply, reply, stamp

log = logging.getLogger("turnout.simulation")

# Room for replies that one job may take in shared memory, and the most clients in one job.
_JOB_BYTES: Final = 16 << 20
_MOST_CLIENTS: Final = 64


class ProcessesExecutor(Executor):
    """``workers`` processes, each with one PyTorch thread; forked when the first client is to run.

    What the processes inherit (data, tasks, apps, closures) is not copied. Client states live with the
    parent, so that any worker may serve any client. ``trainer`` is None when clients can only be reached
    by messages. ``instead`` runs the clients where no process can be forked, with the same results.
    """

    def __init__(
        self, clients: LocalClients, workers: int, trainer: CohortTrainer | None, instead: Executor
    ) -> None:
        super().__init__(clients)
        self.workers = workers
        self.trainer = trainer
        self._instead = instead
        self._pool = WorkerPool(workers, lambda parcels: WorkerHandler(parcels, clients, trainer))
        self._states = SharedStates(clients.states, self._pool)
        self._numbers = itertools.count(1)

    @property
    def trains_cohorts(self) -> bool:
        """Whether the clients' app can be driven without messages."""
        return self.trainer is not None

    def started(self) -> Executor:
        """Fork the workers; hand over to another executor, and say so, if they do not start."""
        try:
            self._pool.start()
        except WorkersDoNotStartError as failure:
            log.warning(
                "%s, as happens beside busy threads of other libraries (for gRPC, import turnout first); the "
                "clients run in this process alone, with the same results",
                failure,
            )
            return self._instead
        return self

    def run(
        self, requests: Iterable[Message], *, server_round: int, deadline: float | None, ordered: bool
    ) -> Generator[Message, None, None]:
        """Yield replies as they complete, or in the order of the requests."""
        shared = _SharedContents(self._pool)
        jobs = (_MessageJob(self, message, server_round, deadline, shared) for message in requests)
        try:
            for answer in self._pool.run(jobs, deadline=deadline, ordered=ordered):
                if answer is not None:
                    yield answer
                del answer
        finally:
            shared.retire()

    def train_cohort(self, cohort: Cohort, *, deadline: float | None) -> Generator[Batch, None, None]:
        """Yield batches as workers complete them."""
        described: list[Entry] = []
        try:
            jobs = self._cohort_jobs(cohort, deadline, described)
            for result in self._pool.run(jobs, deadline=deadline, ordered=False):
                if result is None:
                    continue
                batch, blocks = result
                try:
                    yield batch
                finally:
                    for entry in blocks:
                        self._pool.release(entry)
                del batch, result
        finally:
            # Workers that still run late clients read the blocks: they go when those are done.
            self._pool.release_when_settled(described)

    def settle(self) -> None:
        """Wait until no worker has anything to do."""
        self._pool.settle()

    def states_replaced(self) -> None:
        """Forget what is known of the states in shared memory."""
        self._states.forget()

    def trim_states(self) -> None:
        """Let go of what is too much, once no late client works on it."""
        if self.clients.states.exceeds:
            self.settle()
            self._states.forget(self.clients.states.trim())

    def _cohort_jobs(self, cohort: Cohort, deadline: float | None, described: list[Entry]) -> Iterator[Job]:
        for part in cohort.parts:
            work = PartWork(cohort.server_round, cohort.layout, cohort.sent, part.content, part.instruction)
            description = describe_part(work, self._pool.parcels)
            text = self._pool.parcels.put(np.frombuffer(json.dumps(description).encode(), np.uint8))
            described += [text, *entries(description)]
            address = {"number": next(self._numbers), "round": work.server_round, "at": text}
            assert self.trainer is not None
            ordered = self.trainer.ordered(part.nodes)
            least = self.trainer.least(work, ordered) if ordered else 1
            capacity = min(max(_MOST_CLIENTS, least), rows_within(work, _JOB_BYTES))
            for nodes in _shares(ordered, self.workers, least, capacity):
                yield _CohortJob(self, cohort, work, nodes, capacity, deadline, address)


def _shares(nodes: Sequence[int], workers: int, least: int, most: int) -> Iterator[Sequence[int]]:
    """Cut ``nodes`` into jobs that become smaller towards the end, so that all workers end together.

    A job has about ``least`` clients or a multiple of that: as many as give every worker an equal share.
    """
    smallest = workers * max(1, round(len(nodes) / (workers * least)))
    start, least = 0, -(-len(nodes) // smallest)
    while start < len(nodes):
        size = min(most, least * -(-(len(nodes) - start) // (2 * workers * least)))
        yield nodes[start : start + size]
        start += size


def _stamped(message: Message, request: Message) -> Message:
    stamp(message, reply_id(request))
    return message


class _SharedContents:
    """Contents of the requests of one exchange, copied into shared memory once however many share them."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._trees: dict[int, tuple[RecordDict, list[Any]]] = {}

    def tree(self, content: RecordDict) -> list[Any]:
        if id(content) not in self._trees:
            self._trees[id(content)] = (content, self._pool.parcels.wrap(content))
        return self._trees[id(content)][1]

    def retire(self) -> None:
        self._pool.release_when_settled([e for _, tree in self._trees.values() for e in entries(tree)])


class _MessageJob(Job):
    """One request to one client."""

    def __init__(
        self,
        executor: ProcessesExecutor,
        message: Message,
        server_round: int,
        deadline: float | None,
        shared: _SharedContents,
    ) -> None:
        self._executor, self._message = executor, message
        self._round, self._deadline, self._shared = server_round, deadline, shared
        self.nodes = (message.metadata.dst_node_id,)

    def command(self) -> dict[str, Any]:
        metadata = self._message.metadata
        return {
            "op": "message",
            "node": metadata.dst_node_id,
            "round": self._round,
            "deadline": self._deadline,
            "type": metadata.message_type,
            "id": metadata.message_id,
            "group": metadata.group_id,
            "content": self._shared.tree(self._message.content),
            "state": self._executor._states.tree(metadata.dst_node_id),
        }

    def finish(self, answer: Answer, *, late: bool) -> Message | None:
        if "late" in answer:
            return None
        executor = self._executor
        executor._states.replace(self.nodes[0], answer["state"])
        if "error" in answer:
            code, reason = answer["error"]
            if code == CLIENT_APP_RAISED:
                executor.clients.count_failures(1)
            return None if late else _stamped(error_reply(self._message, reason, code), self._message)
        content = None if late else executor._pool.parcels.copied(answer["content"])
        for entry in entries(answer["content"]):
            executor._pool.release(entry)
        return None if content is None else _stamped(reply(content, to=self._message), self._message)

    def lost(self, reason: str) -> Message:
        executor = self._executor
        executor.clients.count_failures(1)
        return _stamped(error_reply(self._message, f"client {self.nodes[0]}: {reason}"), self._message)


class _CohortJob(Job):
    """Some clients of one part of a cohort."""

    def __init__(
        self,
        executor: ProcessesExecutor,
        cohort: Cohort,
        work: PartWork,
        nodes: Sequence[int],
        capacity: int,
        deadline: float | None,
        address: dict[str, Any],
    ) -> None:
        self._executor, self._cohort, self._work = executor, cohort, work
        self._capacity, self._deadline, self._address = capacity, deadline, address
        self.nodes = tuple(nodes)

    def command(self) -> dict[str, Any]:
        trees = {node: self._executor._states.tree(node) for node in self.nodes}
        return {
            "op": "cohort",
            "part": self._address,
            "nodes": self.nodes,
            "capacity": self._capacity,
            "deadline": self._deadline,
            "states": {node: tree for node, tree in trees.items() if tree},
        }

    def finish(self, answer: Answer, *, late: bool) -> tuple[Batch, list[Entry]] | None:
        if "late" in answer:
            return None
        executor = self._executor
        for node, tree in answer["states"].items():
            executor._states.replace(int(node), tree)
        failures = [(node, ReplyRejected(slug, reason)) for node, slug, reason in answer["failures"]]
        executor.clients.count_failures(sum(refused.reason == CLIENT_RAISED for _, refused in failures))
        blocks = answer["arrays"]
        if late:
            self.drop((None, blocks))
            return None
        arrays = iter(blocks)
        table = ReplyTable.allocated(
            self._work, self._capacity, lambda _dtype, _shape: executor._pool.parcels.get(next(arrays))
        )
        table.nodes, table.failures = answer["nodes"], failures
        return table.batch(self._work.instruction), blocks

    def drop(self, result: Any) -> None:
        if result is not None:
            for entry in result[1]:
                self._executor._pool.release(entry)

    def lost(self, reason: str) -> tuple[Batch, list[Entry]]:
        self._executor.clients.count_failures(len(self.nodes))
        failures = [(node, ReplyRejected(CLIENT_RAISED, f"client {node}: {reason}")) for node in self.nodes]
        return Batch.of_failures(self._work.instruction, self._cohort, failures), []
