"""Clients that send bad replies in one round, and a run that shows what became of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from scripted_grid import Client, ScriptedGrid, SyntheticClient, silent
from strategy_table import KEYS, NODES, Row, federation, initial

from turnout.strategies import Callback, RoundReport
from turnout.wire import as_array, keys, view
from turnout.wire.flower import reply

BAD_ROUND, ROUNDS, CULPRIT = 2, 3, 3


def record(**arrays: Any) -> Callable[[RecordDict], None]:
    """A change of some arrays of the reply's own vector: values, an `Array`, or None to leave it out."""

    def change(content: RecordDict) -> None:
        name = keys.GRADIENT if keys.GRADIENT in content else keys.ARRAYS
        changed = ArrayRecord()
        for key, old in content[name].items():
            new = arrays.get(key.replace(".", "_"), old)
            if new is not None:
                changed[key] = new if isinstance(new, Array) else as_array(new)
        for key in arrays.keys() - {k.replace(".", "_") for k in content[name]}:
            changed[key] = as_array(arrays[key])
        content[name] = changed

    return change


def metrics(**values: Any) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        known = dict(content[keys.METRICS])
        for name, value in values.items():
            known.pop(name.replace("_", "-"), None)
            if value is not None:
                known[name.replace("_", "-")] = value
        content[keys.METRICS] = MetricRecord(known)

    return change


def bias(value: float) -> Callable[[RecordDict], None]:
    array = np.ones(4, np.float32)
    array[2] = value
    return record(fc_bias=array)


def without_vector(content: RecordDict) -> None:
    del content[keys.GRADIENT if keys.GRADIENT in content else keys.ARRAYS]


def without_metrics(content: RecordDict) -> None:
    del content[keys.METRICS]


def metrics_as_config(content: RecordDict) -> None:
    content[keys.METRICS] = ConfigRecord({"num-examples": "ten"})


def scalar(shape: str, data: int = 16) -> Array:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode()
    raw = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * data
    return Array("float32", (4,), "numpy.ndarray", raw)


class Culprit(SyntheticClient):
    """An honest client that in one round changes its reply before it sends it."""

    change: Callable[[RecordDict], None]

    def __call__(self, message: Message) -> Message | Iterable[Message]:
        content = self.content(message)
        if message.content[keys.CONFIG][keys.SERVER_ROUND] == BAD_ROUND:
            self.change(content)
        return reply(content, to=message)


class Reports(Callback):
    def __init__(self) -> None:
        self.rounds: list[RoundReport] = []
        self.models: list[bytes] = []

    def on_round_end(self, report: RoundReport) -> None:
        self.rounds.append(report)
        self.models.append(b"".join(view(array).tobytes() for array in report.arrays.values()))


def run(row: Row, culprit: Client, *, present: Iterable[int] = NODES, **options: Any) -> Reports:
    """Everyone takes part in all rounds; ``culprit`` sits at one node, after the others in line."""
    clients = federation() | {NODES[CULPRIT]: culprit}
    last = sorted(present, key=lambda node: node == NODES[CULPRIT])
    grid = ScriptedGrid(clients, lambda _: last, **options)
    reports = Reports()
    row.strategy().start(grid, initial(), num_rounds=ROUNDS, callbacks=[reports])
    return reports


def bad(change: Callable[[RecordDict], None]) -> Culprit:
    client = Culprit(KEYS[CULPRIT], number=CULPRIT, examples=33)
    client.change = change
    return client


def absent_once() -> Client:
    honest = SyntheticClient(KEYS[CULPRIT], number=CULPRIT, examples=33)
    return lambda m: silent(m) if m.content["config"]["server-round"] == BAD_ROUND else honest(m)


def everyone(row: Row) -> Row:
    """The same without a draw of the cohort, so that the culprit is asked in every round."""
    return replace(row, options={**row.options, "clients_per_round": None}) if "rerce" in row.name else row
