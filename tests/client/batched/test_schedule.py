"""Batches of many clients are those that each client would draw by itself."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.client.batched.batches import ClientExamples, Examples
from turnout.client.batched.schedule import shuffled, whole_sets
from turnout.client.minibatches import generator, minibatches
from turnout.tasks import ClientData


def data_of(client: int, size: int, width: int) -> ClientData:
    """Every number says whose it is."""
    x = 1000.0 * client + torch.arange(size * width, dtype=torch.float64).view(size, width)
    return ClientData(x, 1000 * client + torch.arange(size))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    batch_size=st.integers(1, 45),
    steps=st.none() | st.integers(1, 12),
    epochs=st.integers(1, 3),
    wide=st.booleans(),
)
def test_batches_are_those_of_each_client(sizes, batch_size, steps, epochs, wide):
    for whole in (True, False):
        group = sorted((n for n in sizes if (n <= batch_size) is whole), reverse=True)
        if not group:
            continue
        # Wide rows are gathered for one client at a time, and for few steps at once.
        data = [data_of(i, n, 9000 if wide else 3) for i, n in enumerate(group)]
        examples = Examples([ClientExamples(d) for d in data])
        if whole:
            schedule = whole_sets(examples.counts, epochs if steps is None else steps)
        else:
            rngs = [generator(1, i, 2) for i in range(len(group))]
            schedule = shuffled(examples.counts, rngs, batch_size=batch_size, steps=steps, epochs=epochs)
        expected = [
            list(
                minibatches(
                    d, lambda i=i: generator(1, i, 2), batch_size=batch_size, steps=steps, epochs=epochs
                )
            )
            for i, d in enumerate(data)
        ]
        assert schedule.steps.tolist() == [len(batches) for batches in expected]
        for k, batch in enumerate(examples.batches(schedule, torch.float64)):
            present = [batches[k] for batches in expected if k < len(batches)]
            assert batch.sizes.tolist() == [len(y) for _, y in present]
            assert batch.x.shape[1] == max(batch.sizes)  # No more padding than the largest batch asks for.
            for i, (x, y) in enumerate(present):
                assert torch.equal(batch.x[i, : len(y)], x)
                assert torch.equal(batch.y[i, : len(y)], y)
                if batch.weights is None:
                    assert len(y) == batch.x.shape[1]
                else:
                    mean = np.zeros(batch.x.shape[1])
                    mean[: len(y)] = 1 / len(y)
                    np.testing.assert_array_equal(batch.weights[i].numpy(), mean)
        assert k == len(schedule.active) - 1
