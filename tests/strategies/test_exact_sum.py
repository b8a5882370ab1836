"""The order-free sum: the same bits in any order, and as accurate as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.strategies import exact_sum
from turnout.strategies.exact_sum import ExactSum, peak

Terms = list[tuple[np.ndarray, float]]


def total(terms: Terms, like: np.ndarray) -> np.ndarray:
    summed = ExactSum(like)
    for vector, weight in terms:
        summed.add(vector, weight)
    value: np.ndarray = summed.value()
    return value


def fsum(terms: Terms) -> np.ndarray:
    rows = np.array([np.float64(v) * w for v, w in terms])
    return np.array([math.fsum(column) for column in rows.T])


@st.composite
def spread_terms(draw: st.DrawFn) -> tuple[Terms, list[int]]:
    """Vectors of widely differing magnitudes, and a permutation of them."""
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, 12))
    scales = [10.0 ** draw(st.integers(-20, 8)) for _ in range(count)]
    weights = [draw(st.sampled_from([1.0, -1.0, 0.37, 1e-3, 250.0, 0.0])) for _ in range(count)]
    vectors = [(scale * rng.standard_normal(5)).astype(dtype) for scale in scales]
    return list(zip(vectors, weights, strict=True)), draw(st.permutations(range(count)))


class TestOrder:
    @given(spread_terms())
    def test_any_order_gives_the_same_bits(self, drawn: tuple[Terms, list[int]]) -> None:
        terms, permutation = drawn
        like = terms[0][0]
        assert total(terms, like).tobytes() == total([terms[i] for i in permutation], like).tobytes()

    @pytest.mark.parametrize("alike", [None, 1.0, 0.37])
    @given(spread_terms())
    @settings(max_examples=30)
    def test_rows_lent_together_are_added_as_one_by_one(
        self, alike: float | None, drawn: tuple[Terms, list[int]]
    ) -> None:
        terms, order = drawn
        terms = [(vector, weight if alike is None else alike) for vector, weight in terms]
        lent = ExactSum(terms[0][0])
        lent.lend(np.stack([vector for vector, _ in terms]))
        for index in order[len(order) // 3 :]:
            lent.add(lent.row(index), terms[index][1])
        lent.settle()
        alone = total([terms[i] for i in order[len(order) // 3 :]], terms[0][0])
        assert lent.value().tobytes() == alone.tobytes()

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_where_plain_sums_differ(self, dtype: type) -> None:
        rng = np.random.default_rng(0)
        terms = [(rng.standard_normal(1000).astype(dtype), w) for w in rng.uniform(0.1, 1, 64)]
        plain = [sum(np.float64(v) * w for v, w in order) for order in (terms, terms[::-1])]
        assert plain[0].tobytes() != plain[1].tobytes()
        exact = [total(order, terms[0][0]) for order in (terms, terms[::-1])]
        assert exact[0].tobytes() == exact[1].tobytes()

    def test_levels_that_are_dropped_are_dropped_in_any_order(self) -> None:
        small, large = np.full(3, 1e-12, np.float32), np.full(3, 1e6, np.float32)
        middle = np.full(3, 1.0, np.float32)
        results = {
            total([(v, 1.0) for v in order], small).tobytes()
            for order in ([small, middle, large], [large, middle, small], [middle, large, small])
        }
        assert len(results) == 1
        assert np.frombuffer(results.pop())[0] == 1e6 + 1.0

    def test_reset_forgets_everything(self) -> None:
        summed = ExactSum(np.zeros(3, np.float32))
        summed.add(np.full(3, 1e9, np.float32))
        summed.add(np.full(3, 1e-3, np.float32))
        summed.reset()
        assert not summed.value().any()
        summed.add(np.full(3, 1e-12, np.float32))  # Would be dropped beside 1e9.
        np.testing.assert_allclose(summed.value(), np.float64(np.float32(1e-12)), rtol=2**-24)


class TestAccuracy:
    @given(spread_terms())
    def test_against_fsum(self, drawn: tuple[Terms, list[int]]) -> None:
        terms, _ = drawn
        largest = max(abs(w) * float(np.abs(v).max()) for v, w in terms)
        bits = 56 if terms[0][0].dtype == np.float64 else 24
        error = np.abs(total(terms, terms[0][0]) - fsum(terms)).max()
        # The last addition of the levels is a float64 one.
        assert error <= len(terms) * largest * (2.0**-bits + 2.0**-53)

    def test_float64_models_keep_their_precision(self) -> None:
        rng = np.random.default_rng(1)
        terms = [(rng.standard_normal(200), w) for w in rng.uniform(0.1, 1, 50)]
        np.testing.assert_allclose(total(terms, terms[0][0]), fsum(terms), rtol=0, atol=1e-14)

    def test_a_million_terms_do_not_drift(self) -> None:
        summed, term = ExactSum(np.zeros(1, np.float32)), np.full(1, 0.1, np.float32)
        for _ in range(20_000):
            summed.add(term, largest=float(term[0]))
        assert summed.value()[0] == pytest.approx(20_000 * float(term[0]), rel=2**-24)

    def test_exact_where_float32_terms_have_few_bits(self) -> None:
        terms = [(np.float32([0.5, -3, 2**-10]), 2.0), (np.float32([1, 1, 1]), 4.0)]
        assert total(terms, terms[0][0]).tolist() == [5.0, -2.0, 2**-9 + 4]

    @pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-300, 1e300])
    def test_extreme_magnitudes(self, scale: float) -> None:
        terms = [(np.array([1.0, -0.25]) * scale, 1.0), (np.array([0.5, 0.5]) * scale, 1.0)]
        np.testing.assert_allclose(total(terms, terms[0][0]), fsum(terms), rtol=1e-15)

    def test_empty_zero_and_strided_vectors(self) -> None:
        assert total([(np.zeros(0, np.float32), 1.0)], np.zeros(0, np.float32)).shape == (0,)
        assert not total([(np.zeros(3, np.float32), 1.0)], np.zeros(3, np.float32)).any()
        strided = np.arange(10, dtype=np.float32)[::3]
        np.testing.assert_array_equal(total([(strided, 1.0)], strided), strided)


class TestBlocks:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_long_vectors_on_two_threads(self, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(2)
        size = 16 * exact_sum.BLOCK + 12_345
        vectors = [rng.standard_normal(size).astype(dtype) for _ in range(2)]
        weights = (0.3, -1.7)
        whole = total(list(zip(vectors, weights, strict=True)), vectors[0])
        # The same piece by piece, each with the whole vector's largest value.
        for part in (slice(0, 100), slice(exact_sum.BLOCK - 5, exact_sum.BLOCK + 5), slice(size - 7, size)):
            summed = ExactSum(vectors[0][part])
            for v, w in zip(vectors, weights, strict=True):
                summed.add(v[part], w, largest=peak(v))
            assert summed.value().tobytes() == whole[part].tobytes()


class TestTorch:
    @given(spread_terms())
    @settings(max_examples=40)
    def test_equals_numpy_to_the_bit(self, drawn: tuple[Terms, list[int]]) -> None:
        terms, _ = drawn
        summed = ExactSum(torch.from_numpy(terms[0][0]))
        for vector, weight in terms:
            summed.add(torch.from_numpy(vector), weight)
        result = summed.value()
        assert isinstance(result, torch.Tensor)
        assert result.dtype == torch.float64
        assert result.numpy().tobytes() == total(terms, terms[0][0]).tobytes()

    def test_peak(self) -> None:
        for vector in (np.array([1.0, -3.0, 2.0]), np.zeros(0), np.array([[1.0], [-2.0]])):
            assert peak(torch.from_numpy(vector)) == peak(vector)
        assert math.isnan(peak(np.array([1.0, math.nan])))
        assert math.isnan(peak(torch.tensor([1.0, math.nan])))


class TestRefusals:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_non_finite_terms(self, value: float) -> None:
        summed = ExactSum(np.zeros(2, np.float32))
        with pytest.raises(ValueError, match="not finite"):
            summed.add(np.array([1.0, value], np.float32))
        with pytest.raises(ValueError, match="not finite"):
            summed.add(np.ones(2, np.float32), value)
        assert not summed.value().any()

    def test_too_large_for_the_grid(self) -> None:
        with pytest.raises(ValueError, match="too large"):
            ExactSum(np.zeros(1)).add(np.array([1e305]))

    def test_too_many_terms(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exact_sum, "_HEADROOM", 2)
        summed = ExactSum(np.zeros(1, np.float32))
        for _ in range(7):
            summed.add(np.ones(1, np.float32))
        assert summed.value()[0] == 7
        with pytest.raises(OverflowError, match="split the round"):
            summed.add(np.ones(1, np.float32))
