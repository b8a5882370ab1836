"""The generator of a client's round is NumPy's, seeded by the three numbers."""

from __future__ import annotations

import numpy as np
import pytest

from turnout.client.minibatches import generator


@pytest.mark.parametrize(
    "entropy", [(0, 0, 0), (1, 2, 3), (0, 7, 2**32 - 1), (2**32, 1, 1), (5, 2**40 + 1, 9), (2**70, 0, 1)]
)
def test_the_stream_is_that_of_the_three_numbers(entropy):
    expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(entropy))))
    np.testing.assert_array_equal(generator(*entropy).permutation(50), expected.permutation(50))
