"""Every strategy against its paper's formula in float64, over 40 rounds, given the same replies."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Message
from reference_rules import Arrival, Rule
from scripted_grid import ScriptedGrid, SyntheticClient, failing, shuffled, silent
from strategy_table import EXAMPLES, KEYS, NODES, ROWS, TOLERANCE, Row, federation, initial

from turnout.strategies import Callback, RoundReport
from turnout.wire import ParameterLayout, keys

ROUNDS = 40
NOBODY_HERE, NOBODY_WELL = 9, 23
KEY_OF = dict(zip(NODES, KEYS, strict=True))
EXAMPLES_OF = dict(zip(NODES, EXAMPLES, strict=True))


def present(server_round: int) -> list[int]:
    """Three nodes at first; nobody in one round; later anyone, each on about half of the time."""
    if server_round == 1:
        return [NODES[2], NODES[0], NODES[6], NODES[4]]
    if server_round == NOBODY_HERE:
        return []
    on = np.random.default_rng([7, server_round]).random(len(NODES)) < 0.6
    nodes = [node for node, there in zip(NODES, on, strict=True) if there]
    return nodes[::-1] if server_round % 2 else nodes


class Flaky(SyntheticClient):
    """Fails or stays silent in some rounds, and in one round like everybody else."""

    def __call__(self, message: Message) -> Message | None:
        server_round = int(message.content[keys.CONFIG][keys.SERVER_ROUND])
        luck = np.random.default_rng([8, server_round, self.number]).random()
        if server_round == NOBODY_WELL or luck < 0.12:
            return failing(message)
        return silent(message) if luck < 0.2 else super().__call__(message)  # type: ignore[return-value]


class Comparison(Callback):
    """Runs the reference beside the strategy and compares them after each round."""

    def __init__(self, rule: Rule, grid: ScriptedGrid, layout: ParameterLayout, tolerance: float) -> None:
        self.rule, self.grid, self.layout, self.tolerance = rule, grid, layout, tolerance
        self.registered: list[int] = []
        self.worst = 0.0
        self.accepted: list[int] = []

    def on_round_end(self, report: RoundReport) -> None:
        for node in present(report.server_round):
            if KEY_OF[node] not in self.registered:
                self.registered.append(KEY_OF[node])
        requests = {m.metadata.dst_node_id: m for m in self.grid.sent[-1]}
        accepted = [c.client for c in report.clients if c.outcome == "ok"]
        arrivals = []
        for node, message in requests.items():
            self.compare("sent", self.vector(message, keys.ARRAYS), self.rule.sent())
            if keys.BULLSEYE in message.content:
                self.compare("bullseye", self.vector(message, keys.BULLSEYE), self.rule.bullseye)  # type: ignore[attr-defined]
            if message.content[keys.CONFIG][keys.LOCAL_UPDATE] == "scaffold":
                self.compare("control", self.vector(message, keys.CONTROL), self.rule.control)  # type: ignore[attr-defined]
            if KEY_OF[node] in accepted:
                arrivals.append(self.arrival(node, message))
        assert len(arrivals) == len(accepted)
        self.rule.round(self.registered, arrivals)
        self.compare("model", np.float64(self.layout.flatten(report.arrays)), self.rule.x)
        self.accepted.append(len(accepted))

    def arrival(self, node: int, message: Message) -> Arrival:
        client = self.grid.clients[node]
        assert isinstance(client, SyntheticClient)
        content = client.content(message)

        def part(name: str) -> np.ndarray | None:
            return np.float64(self.layout.flatten(content[name])) if name in content else None

        role = str(message.content[keys.CONFIG][keys.LOCAL_UPDATE])
        received = self.vector(message, keys.ARRAYS)
        model, gradient, control = (part(name) for name in (keys.ARRAYS, keys.GRADIENT, keys.CONTROL))
        return Arrival(KEY_OF[node], EXAMPLES_OF[node], role, received, model, gradient, control)

    def vector(self, message: Message, name: str) -> np.ndarray:
        return np.float64(self.layout.flatten(message.content[name]))

    def compare(self, what: str, ours: np.ndarray, reference: np.ndarray) -> None:
        assert np.isfinite(ours).all()
        error = np.abs(ours - reference).max() / max(np.abs(reference).max(), 1e-30)
        self.worst = max(self.worst, float(error))
        assert error < self.tolerance, f"round {self.grid.server_round - 1}: {what} is off by {error:.1e}"


def compared(row: Row, rule: Rule) -> Comparison:
    start = initial(width=400, buffers=False)
    layout = ParameterLayout.from_arrays(start)
    assert layout.size > 2000
    clients = {
        node: Flaky(None if i == 6 else KEYS[i], number=i, examples=EXAMPLES[i])
        for i, node in enumerate(NODES)
    }
    grid = ScriptedGrid(clients, present, order=shuffled(3), lazily=True)
    rule.begin(np.float64(layout.flatten(start)))
    comparison = Comparison(rule, grid, layout, TOLERANCE.get(row.name, 2e-5))
    row.strategy().start(grid, start, num_rounds=ROUNDS, callbacks=[comparison])
    return comparison


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_formula(row: Row) -> None:
    comparison = compared(row, row.rule())
    assert len(comparison.accepted) == ROUNDS
    assert comparison.accepted[NOBODY_HERE - 1] == comparison.accepted[NOBODY_WELL - 1] == 0
    assert sum(comparison.accepted) > 60
    assert comparison.worst > 0  # Two computations, not one compared with itself.


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("fedstale", "fedvarp-heterogeneous"),
        ("fedau", "average-all"),
        ("mifa", "fedvarp"),
        ("feddyn", "scaffold"),
        ("rerce-fed", "rerce-fed-scheduled"),
    ],
)
def test_the_comparison_tells_neighbours_apart(name: str, wrong: str) -> None:
    rows = {row.name: row for row in ROWS}
    with pytest.raises((AssertionError, AttributeError)):
        compared(rows[name], rows[wrong].rule())


def test_the_federation_has_what_this_test_is_about() -> None:
    assert max(NODES) >= 2**63
    assert len(federation()) == len(set(KEYS)) == len(set(NODES))
