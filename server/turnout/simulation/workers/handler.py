"""What a worker process does: trains parts of cohorts, and answers messages with the whole ClientApp."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import astuple
from functools import lru_cache
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from turnout.simulation.clients import LocalClients
from turnout.simulation.cohort_trainer import CohortTrainer, PartWork, ReplyTable
from turnout.simulation.workers.parcels import Entry, Parcels
from turnout.strategies.rounds import Instruction
from turnout.wire import NDArray, ParameterLayout, TensorSpec, keys
from turnout.wire.flower import record_dict, records_of, request, stamp
from turnout.wire.torch_threads import use_one_torch_thread


class WorkerHandler:
    """Answers the commands of the pool's parent in a forked child."""

    def __init__(self, parcels: Parcels, clients: LocalClients, trainer: CohortTrainer | None) -> None:
        use_one_torch_thread()
        self._parcels = parcels
        self._clients = clients
        self._trainer = trainer
        self._parts: dict[int, PartWork] = {}

    def __call__(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command and return the answer."""
        if command["op"] == "message":
            return self._message(command)
        return self._cohort(command)

    # Messages.

    def _message(self, command: dict[str, Any]) -> dict[str, Any]:
        if _passed(command["deadline"]):
            return {"late": True}
        content, _ = self._parcels.unwrap(command["content"])
        node = command["node"]
        message = request(content, dst_node_id=node, message_type=command["type"], group_id=command["group"])
        stamp(message, command["id"])
        before, known = self._parcels.unwrap(command["state"])  # Lives until `wrap` has gone by its arrays.
        reply, state = self._clients.call(message, before, server_round=command["round"])
        answer: dict[str, Any] = {"state": self._parcels.wrap(state, known)}
        if reply.has_error():
            return {**answer, "error": [reply.error.code, reply.error.reason]}
        return {**answer, "content": self._parcels.wrap(reply.content)}

    # Cohorts.

    def _cohort(self, command: dict[str, Any]) -> dict[str, Any]:
        if _passed(command["deadline"]):
            return {"late": True}
        assert self._trainer is not None
        work = self._part(command["part"])
        made: list[Entry] = []

        def allocate(dtype: Any, shape: Sequence[int]) -> NDArray:
            entry, array = self._parcels.empty(dtype, shape)
            made.append(entry)
            return array

        table = ReplyTable.allocated(work, command["capacity"], allocate)
        states, known = {}, {}
        for node in command["nodes"]:
            tree = command["states"].get(str(node))
            states[node], known[node] = self._parcels.unwrap(tree) if tree else (RecordDict(), {})
        self._trainer.train(work, command["nodes"], states, table, command["deadline"])
        kept = {
            str(node): self._parcels.wrap(state, known[node])
            for node, state in states.items()
            if state or known[node]
        }
        failures = [[node, refused.reason, str(refused)] for node, refused in table.failures]
        return {"arrays": made, "nodes": table.nodes, "states": kept, "failures": failures}

    def _part(self, address: dict[str, Any]) -> PartWork:
        """Return the part, which is put together once per worker and round."""
        number, server_round = address["number"], address["round"]
        if number not in self._parts:
            self._parts = {n: part for n, part in self._parts.items() if part.server_round == server_round}
            description = json.loads(self._parcels.get(address["at"]).tobytes())
            self._parts[number] = read_part(description, self._parcels)
        return self._parts[number]


def describe_part(work: PartWork, parcels: Parcels) -> dict[str, Any]:
    """Return ``work`` as a JSON-able description, its arrays copied once into the shared heap."""
    layout, content = work.layout, work.content
    records = records_of(content, ArrayRecord)
    vectors = {
        name: parcels.put(layout.flatten(record, with_buffers=False))
        for name, record in records.items()
        if name != keys.ARRAYS
    }
    buffers = layout.buffers_of(records[keys.ARRAYS])
    return {
        "round": work.server_round,
        "layout": _described(layout),
        "sent": parcels.put(work.sent),
        "buffer-values": {name: parcels.put(value) for name, value in buffers.items()},
        "vectors": vectors,
        "config": parcels.wrap(record_dict(records_of(content, ConfigRecord))),
        "local-update": work.instruction.local_update,
        "reply": work.instruction.reply,
        "extras": work.instruction.extras,
    }


def read_part(description: dict[str, Any], parcels: Parcels) -> PartWork:
    """Return the work of a description, around the arrays in place."""
    layout = _layout(description["layout"])
    sent = parcels.get(description["sent"])
    buffers = {name: parcels.get(entry) for name, entry in description["buffer-values"].items()}
    content, _ = parcels.unwrap(description["config"])
    content[keys.ARRAYS] = layout.record(sent, buffers)
    for name, entry in description["vectors"].items():
        content[name] = layout.record(parcels.get(entry))
    instruction = Instruction(
        description["local-update"], reply=description["reply"], extras=tuple(description["extras"])
    )
    return PartWork(description["round"], layout, sent, content, instruction)


@lru_cache(maxsize=8)  # It is mostly the same from round to round.
def _described(layout: ParameterLayout) -> str:
    return json.dumps([[astuple(spec) for spec in specs] for specs in (layout.tensors, layout.buffers)])


@lru_cache(maxsize=8)
def _layout(description: str) -> ParameterLayout:
    tensors, buffers = (
        tuple(TensorSpec(name, tuple(shape), *rest) for name, shape, *rest in rows)
        for rows in json.loads(description)
    )
    return ParameterLayout(tensors, buffers)


def _passed(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline
