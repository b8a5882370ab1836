"""Strategies driven vector by vector, without messages: on NumPy and on torch, with the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from strategy_table import ROWS, Row

from turnout.strategies import Reply
from turnout.strategies.exact_sum import peak
from turnout.wire import ReplyRejected

N, SIZE, ROUNDS = 6, 40, 6
ON_TORCH = [row for row in ROWS if row.options.get("memory", "ram") == "ram"]

# Those that need something of a reply: a probability for its client, or its control variate.
CHOOSY = [row for row in ROWS if "participation" in row.options or row.name == "scaffold"]


def drive(row: Row, convert: Any, dtype: Any) -> list[bytes]:
    """Run rounds with made-up updates and return the model after each, and what was sent."""
    known = {"participation": [0.9, 0.5, 0.3, 1.0, 0.7, 0.2]} if "participation" in row.options else {}
    strategy = row.strategy(**known)
    rng = np.random.default_rng(0)
    strategy.prepare(convert(rng.standard_normal(SIZE).astype(dtype)))
    trail = []
    for t in range(1, ROUNDS + 1):
        present = [] if t == 4 else [i for i in range(N) if t == 1 or rng.random() < 0.6]
        strategy.begin_round(t, range(N))
        cohort = strategy.select(t, present)
        sent = strategy.broadcast()
        for node, asked in cohort.items():
            draws = (rng.standard_normal((2, SIZE)) * 10.0 ** (node - 2)).astype(dtype)
            update = convert(draws[0])
            vectors = {"control": convert(draws[1])}
            metrics = {"momentum-square": 1.0 + node}
            role, size = asked.local_update, 3 + node
            strategy.accept(t, Reply(node, update, size, peak(update), role, vectors, metrics))
        model = strategy.end_round(t)
        trail += [np.asarray(sent).tobytes(), np.asarray(model).tobytes()]
        assert type(model) is type(convert(np.zeros(1)))
    return trail


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("row", ON_TORCH, ids=str)
def test_torch_and_numpy_give_the_same_bits(row: Row, dtype: Any) -> None:
    assert drive(row, torch.from_numpy, dtype) == drive(row, np.asarray, dtype)


@pytest.mark.parametrize("row", CHOOSY, ids=str)
def test_a_refused_reply_leaves_no_trace(row: Row) -> None:
    options = {} if row.name == "scaffold" else {"participation": {0: 0.5}}
    strategy = row.strategy(**options)
    strategy.prepare(np.zeros(3))
    strategy.begin_round(1, range(2))
    with pytest.raises(ReplyRejected):
        strategy.accept(1, Reply(1, np.ones(3), 1, 1.0, "scaffold"))
    assert strategy.reports == []
    assert strategy.clients.entries[1].last_seen == 0
    assert not strategy.end_round(1).any()
    assert not getattr(strategy, "stale", [])
