"""ECO on the server: what is sent, and what it is to clients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord
from scripted_grid import ScriptedGrid
from strategy_table import NODES, federation, initial

from turnout.strategies import ServerECO
from turnout.strategies.svd_factors import SvdFactors
from turnout.wire import ConfigError, as_array, view
from turnout.wire.grid_codes import GRID_STYPE
from turnout.wire.packing import pack


def sent(start: ArrayRecord, rounds: int, **options: Any) -> tuple[ServerECO, list[ArrayRecord]]:
    """Return the strategy after some rounds, and the models that it sent."""
    grid, strategy = ScriptedGrid(federation(), lambda _: list(NODES)), ServerECO(**options)
    strategy.start(grid, start, num_rounds=rounds)
    return strategy, [requests[0].content["arrays"] for requests in grid.sent]  # type: ignore[misc]


@pytest.mark.parametrize(("bits", "size"), [(8, 200), (4, 100), (2, 40)])
def test_the_first_model_is_sent_whole_and_codes_after_it(bits: int, size: int) -> None:
    strategy, models = sent(initial(width=40, buffers=False), 3, bits=bits)
    first, second, third = models
    assert {array.stype for array in first.values()} == {"numpy.ndarray"}
    for model in (second, third):
        assert [name for name, array in model.items() if array.stype == GRID_STYPE] == ["fc.weight"]
        assert pack(model)[0].size - 4 * 41 - 8 - 4 * 40 - size in range(8)
        weight = view(model["fc.weight"])
        assert all(len(np.unique(np.abs(row))) <= 2 ** (bits - 1) for row in weight)
    # What clients read is the strategy's model, to the bit.
    np.testing.assert_array_equal(strategy.layout.flatten(strategy.travelling(strategy.x)), strategy.x)


def test_tensors_of_16_bits_travel_as_they_are() -> None:
    start = initial(buffers=False)
    start["fc.weight"] = as_array(view(start["fc.weight"]).astype(np.float16))
    strategy, models = sent(start, 3)
    assert {array.dtype for array in models[-1].values()} == {"float16", "float32"}
    assert all(report.outcome == "ok" for report in strategy.reports)


def test_factors_that_are_averaged_as_products_are_refused() -> None:
    strategy = ServerECO()
    strategy.coordinates = SvdFactors(("lora_A", "lora_B"), 1.0)
    with pytest.raises(ConfigError, match="exact-svd"):
        strategy.setup()
