"""Driving a strategy with vectors and running it with messages give the same model, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from turnout.reproduce import fedstale
from turnout.reproduce.admm_clients import AdmmClients, Channel, weak
from turnout.reproduce.drive import Work, drive
from turnout.reproduce.fedamd_clients import GROWING, Quadratics, scaffold_work, work
from turnout.simulation import LocalGrid, Trace
from turnout.strategies import DualADMM, FedAMD, FedAU, FedStale, FedVARP, Instruction, RerceFed, Scaffold
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import as_array, keys, view

ROUNDS = 12
Vector = np.ndarray[Any, Any]


@dataclass
class Case:
    """A strategy, fresh clients, the initial model and who is present, shape (rounds, clients)."""

    strategy: StreamingStrategy
    work: Work
    start: Vector
    masks: Vector


def stale_case(strategy: StreamingStrategy) -> Case:
    sizes = fedstale.Sizes(num_clients=8, dimension=5, rounds=ROUNDS)
    problem = fedstale.Quadratics((fedstale.ROWS[0], fedstale.ROWS[2]), sizes, seed=1)
    masks = np.random.default_rng(0).random((ROUNDS, 8)) < 0.5
    masks[3] = False
    return Case(strategy, problem.work, problem.start, masks)


def mining_case(strategy: StreamingStrategy) -> Case:
    problem = Quadratics(8, 3, 6, GROWING, seed=1)
    masks = np.zeros((ROUNDS, 8), bool)
    masks[0] = True
    for server_round in range(2, ROUNDS + 1):
        masks[server_round - 1, problem.present(server_round)] = True
    answer: Work = partial(scaffold_work if isinstance(strategy, Scaffold) else work, problem)
    return Case(strategy, answer, problem.start, masks)


def admm_case(strategy: StreamingStrategy) -> Case:
    problem = weak(1, num_clients=8)
    channel = Channel(8, 4, ROUNDS, sigma=0.1, seed=1)
    clients = AdmmClients(problem.curvature, problem.linear, 1.0, channel)
    return Case(strategy, clients.work, np.zeros(4), np.ones((ROUNDS, 8), bool))


CASES = {
    "fedstale": lambda: stale_case(FedStale(participation="estimate")),
    "fedstale, known p": lambda: stale_case(FedStale(num_clients=8, participation=0.5, beta=0.3)),
    "fedvarp": lambda: stale_case(FedVARP()),
    "fedau": lambda: stale_case(FedAU(cutoff=4)),
    "fedamd": lambda: mining_case(FedAMD(seed=3)),
    "scaffold": lambda: mining_case(Scaffold()),
    "rerce-fed": lambda: admm_case(RerceFed(clients_per_round=3, continual=False)),
    "dual-admm": lambda: admm_case(DualADMM(clients_per_round=3)),
}


def numpy_app(answer: Work) -> ClientApp:
    """Return a ClientApp around what a study's clients do, for a cohort of one."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content = message.content
        client = int(context.node_config["partition-id"])
        config: dict[str, Any] = dict(content.config_records[keys.CONFIG])
        arrays = {name: view(record["w"]) for name, record in content.array_records.items()}
        received = arrays.pop(keys.ARRAYS)
        told = Instruction(config[keys.LOCAL_UPDATE], config, arrays)
        (sent,) = answer(config[keys.SERVER_ROUND], received, {client: told})
        metrics = MetricRecord({keys.NUM_EXAMPLES: 1, keys.CLIENT_ID: client})
        reply = RecordDict({keys.METRICS: metrics})
        reply[keys.GRADIENT if told.local_update == "anchor" else keys.ARRAYS] = record(sent.vectors[0])
        if sent.controls is not None:
            reply[keys.CONTROL] = record(sent.controls[0])
        return Message(reply, reply_to=message)

    return app


def record(vector: Vector) -> ArrayRecord:
    made = ArrayRecord()
    made["w"] = as_array(vector)
    return made


@pytest.mark.parametrize("name", CASES)
def test_messages_and_vectors_give_the_same_model(name: str) -> None:
    by_vectors, by_messages = CASES[name](), CASES[name]()
    expected = drive(
        by_vectors.strategy,
        by_vectors.start,
        num_clients=8,
        rounds=ROUNDS,
        present=lambda server_round: np.flatnonzero(by_vectors.masks[server_round - 1]).tolist(),
        work=by_vectors.work,
        observe=lambda server_round, model: None,
    )
    grid = LocalGrid(numpy_app(by_messages.work), 8, participation=Trace(by_messages.masks))
    result = by_messages.strategy.start(grid, record(by_messages.start), num_rounds=ROUNDS)
    assert grid.tally.failed == 0
    assert not np.array_equal(expected, by_vectors.start)
    assert view(result.arrays["w"]).tobytes() == expected.tobytes()
