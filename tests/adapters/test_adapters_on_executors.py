"""Adapters on a small transformer: one process and several end with the same bits."""

from __future__ import annotations

import pytest
from adapter_federation import ADAPTERS, digest, experiment, needs_plays, simulated

from turnout.experiment.build import build


@needs_plays
@pytest.mark.data
@pytest.mark.parametrize("slug", ADAPTERS)
def test_processes_end_with_the_bits_of_one(slug: str) -> None:
    serial = simulated(slug, "serial")
    start = build(experiment(slug)).task.initial_arrays()
    assert set(serial) == set(start)
    assert digest(serial) != digest(start)
    assert digest(simulated(slug, "processes")) == digest(serial)
