"""EGGROLL's noise: moments, rank, the variance of the estimate, and sums that are exact in any order."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from turnout.wire import ConfigError
from turnout.wire.perturbation import (
    GRID,
    Factors,
    NoiseSource,
    PerturbedTensor,
    dense,
    model_tensors,
    on_grid,
)

M, N = 6, 5
NOISES = ("gaussian", "rademacher")


def source(
    rank: int | None = 1, noise: str = "gaussian", m: int = M, n: int = N, seed: int = 7
) -> NoiseSource:
    return NoiseSource(model_tensors({"w": (m, n)}, rank, freeze_1d=False), seed, rank or 1, noise)  # type: ignore[arg-type]


def perturbations(noise: NoiseSource, pairs: int) -> np.ndarray:
    (tensor,) = noise.tensors
    return np.array([dense(noise.draw(1, j)[0], tensor, noise.rank) for j in range(pairs)])


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("rank", [1, 4, None])
def test_entries_have_mean_0_variance_1_and_no_covariance(rank: int | None, noise: str) -> None:
    count = 4000
    entries = perturbations(source(rank, noise), count).reshape(count, -1)
    # Fourth moments of rank 1 are 9: five standard deviations of the variance are below 0.25.
    assert np.abs(entries.mean(axis=0)).max() < 5 / np.sqrt(count)
    assert np.abs((entries**2).mean(axis=0) - 1).max() < 5 * np.sqrt(8 / count)
    assert max(
        abs((entries[:, i] * entries[:, j]).mean()) for i, j in combinations(range(M * N), 2)
    ) < 5 * np.sqrt(3 / count)


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_variance_of_the_estimate_is_the_formulas(rank: int) -> None:
    """``E[(E:g)^2 ||E||_F^2] = ||g||^2 (mn + 2 + (2m + 2n + 2) / r)``."""
    count = 20_000
    g = np.random.default_rng(3).standard_normal((M, N))
    e = perturbations(source(rank), count)
    inner = np.tensordot(e, g, axes=2)
    values = inner**2 * (e**2).sum(axis=(1, 2)) / (g**2).sum()
    formula = M * N + 2 + (2 * M + 2 * N + 2) / rank
    assert abs(values.mean() - formula) < 5 * values.std() / np.sqrt(count)
    # The estimate itself: E[(E:g) E] = g.
    estimate = (inner[:, None, None] * e).mean(axis=0)
    assert np.linalg.norm(estimate - g) < 1.5 * np.linalg.norm(g) * np.sqrt(formula / count)


def test_rademacher_of_rank_1_has_constant_norm_and_variance_mn() -> None:
    g = np.random.default_rng(3).standard_normal((M, N))
    e = perturbations(source(1, "rademacher"), 20_000)
    assert np.all((e**2).sum(axis=(1, 2)) == M * N)
    values = np.tensordot(e, g, axes=2) ** 2 * M * N / (g**2).sum()
    assert abs(values.mean() - M * N) < 5 * values.std() / np.sqrt(len(values))


@pytest.mark.parametrize(("pairs", "rank"), [(1, 1), (2, 2), (3, 1), (9, 1), (4, 2)])
def test_rank_of_the_update_is_pairs_times_rank(pairs: int, rank: int) -> None:
    noise = source(rank, m=8, n=7)
    weights = on_grid(np.linspace(1.0, 2.0, pairs), rank)
    (g,) = noise.combine(3, np.arange(pairs), weights)
    assert g is not None
    assert np.linalg.matrix_rank(g) == min(pairs * rank, 7)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("rank", [1, 4, None])
def test_sums_are_exact_so_that_neither_order_nor_chunks_matter(rank: int | None, noise: str) -> None:
    made = source(rank, noise)
    rng, count = np.random.default_rng(0), 60
    # Weights of very different size, as one client with many examples makes them.
    weights = on_grid(rng.standard_normal(count) * 10.0 ** rng.integers(-6, 3, count), made.rank)
    (g,) = made.combine(5, np.arange(count), weights)
    assert g is not None
    order = rng.permutation(count)
    (shuffled,) = made.combine(5, order, weights[order])
    assert np.array_equal(g, shuffled)
    # Against rational arithmetic: the sum before the division by sqrt(r) has no rounding at all.
    tensor, exact = made.tensors[0], np.zeros((M, N), object)
    for j in range(count):
        draw = made.draw(5, j)[0]
        if isinstance(draw, Factors):
            a, b = (np.vectorize(lambda v: Fraction(float(v)))(part) for part in (draw.a, draw.b))
            exact = exact + (a @ b.T) * Fraction(float(weights[j]))
        else:
            exact = exact + np.vectorize(lambda v: Fraction(float(v)))(draw.reshape(M, N)) * Fraction(
                float(weights[j])
            )
    expected = exact.astype(float) / np.sqrt(made.rank if tensor.kind == "lowrank" else 1)
    assert np.array_equal(g, expected)


def test_weights_keep_their_sum_to_35_bits_and_zero_stays_zero() -> None:
    weights = np.array([1.0, -3e-5, 0.0, 0.3])
    rounded = on_grid(weights, 4)
    assert rounded.dtype == np.float32
    assert np.abs(rounded - weights).max() <= 1.3 * 4 * 2.0**-24
    assert rounded[2] == 0.0
    assert not on_grid(np.zeros(3), 1).any()
    assert len(on_grid(np.empty(0), 1)) == 0
    with pytest.raises(ValueError, match="not finite"):
        on_grid(np.array([1.0, np.nan]), 1)


def test_noise_follows_from_seed_round_pair_and_name_alone() -> None:
    one = model_tensors({"a": (3, 4), "b": (4,)}, 2, freeze_1d=False)
    other = tuple(reversed(one))
    first, again = NoiseSource(one, 5, 2).draw(9, 2), NoiseSource(other, 5, 2).draw(9, 2)
    assert np.array_equal(first[0].b, again[1].b)  # type: ignore[union-attr]
    assert np.array_equal(first[1], again[0])  # type: ignore[arg-type]
    for seed, server_round, pair in ((6, 9, 2), (5, 8, 2), (5, 9, 3)):
        assert not np.array_equal(first[1], NoiseSource(one, seed, 2).draw(server_round, pair)[1])  # type: ignore[arg-type]


def test_gaussian_noise_lies_on_its_grid_and_shapes_are_matrices() -> None:
    tensors = model_tensors({"conv": (4, 3, 5, 5), "bias": (4,), "scale": ()}, 2, freeze_1d=False)
    conv, bias, scale = NoiseSource(tensors, 0, 2).draw(1, 0)
    assert isinstance(conv, Factors)
    assert (conv.a.shape, conv.b.shape) == ((4, 2), (75, 2))
    for part in (conv.a, conv.b, bias, scale):
        assert part is not None
        assert np.all(part / GRID == np.rint(part / GRID))  # type: ignore[operator]
    assert dense(conv, tensors[0], 2).shape == (4, 3, 5, 5)
    frozen = model_tensors({"w": (2, 2), "b": (2,)}, 1, freeze_1d=True)
    assert [t.kind for t in frozen] == ["lowrank", "frozen"]
    assert NoiseSource(frozen, 0).combine(1, np.arange(1), np.ones(1, np.float32))[1] is None


def test_bad_settings_are_named() -> None:
    tensors = model_tensors({"w": (2, 2)}, 1, freeze_1d=False)
    for options, text in (
        ({"noise": "uniform"}, "unknown noise 'uniform'"),
        ({"seed": -1}, "seed=-1"),
        ({"rank": 0}, "rank=0"),
    ):
        with pytest.raises(ConfigError, match=text):
            NoiseSource(**{"tensors": tensors, "seed": 0, **options})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="one name"):
        NoiseSource((*tensors, *tensors), 0)
    with pytest.raises(ConfigError, match="kind of perturbation"):
        NoiseSource((PerturbedTensor("w", (2,), "half"),), 0)  # type: ignore[arg-type]
