from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from turnout.simulation import constant, given, label_correlated, two_group
from turnout.wire import ConfigError


def test_given_constant_and_two_group() -> None:
    assert given([0.2, 1.0]).tolist() == [0.2, 1.0]
    assert not given([0.2]).flags.writeable
    assert constant(3, 0.25).tolist() == [0.25] * 3
    assert two_group(4, 0.1).tolist() == [1.0, 1.0, 0.1, 0.1]
    assert two_group(3, 0.1, 0.8).tolist() == [0.8, 0.8, 0.1]
    assert given([0.0, 0.5], allow_zero=True).tolist() == [0.0, 0.5]


def test_given_copies() -> None:
    mine = np.array([0.5, 0.5])
    checked = given(mine)
    mine[0] = 0.1
    assert checked[0] == 0.5


def test_label_correlated_is_the_formula() -> None:
    mix = np.random.default_rng([2, 0]).dirichlet(np.full(10, 0.1), size=50)
    p = label_correlated(mix, mean=0.1, minimum=0.02, alpha=0.1, seed=7)
    q = np.random.default_rng([2, 7]).dirichlet([0.1] * 10)
    direct = [max(0.02, 0.1 * 10 * sum(m * w for m, w in zip(row, q, strict=True))) for row in mix]
    assert p == pytest.approx(np.minimum(direct, 1.0), rel=1e-12)
    assert p.min() == 0.02
    assert len(np.unique(p)) > 5


def test_label_correlated_is_capped_at_one() -> None:
    p = label_correlated(np.eye(10), mean=1.0, seed=0)
    q = np.random.default_rng([2, 0]).dirichlet([0.1] * 10)
    assert q.max() > 0.1  # Uncapped, the favourite label's clients would have p = 10 max(q) > 1.
    assert p.max() == 1.0


def test_label_correlated_has_the_stated_mean_over_draws() -> None:
    mix = np.random.default_rng([2, 1]).dirichlet(np.full(10, 1.0), size=20)
    means = [label_correlated(mix, mean=0.05, minimum=1e-9, alpha=5.0, seed=s).mean() for s in range(200)]
    assert np.mean(means) == pytest.approx(0.05, rel=0.05)


def test_label_correlated_gives_zero_to_clients_without_data_only() -> None:
    mix = np.array([[1.0, 0.0], [0.0, 0.0], [0.5, 0.5]])
    p = label_correlated(mix)
    assert p[1] == 0.0
    assert (p[[0, 2]] >= 0.02).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: given([0.5, 0.0]), r"client 1 has p=0.*raise it above 0"),
        (lambda: given([-0.1]), r"client 0 has p=-0\.1"),
        (lambda: given([0.1, 2]), r"client 1 has p=2.*at most 1"),
        (lambda: given([0.1, float("inf")]), r"client 1 has p=inf"),
        (lambda: given([0.1, float("nan")], allow_zero=True), r"client 1 has p=nan"),
        (lambda: given([0.1, 0.2], num_clients=3), r"has 2 values but num_clients is 3"),
        (lambda: given([]), r"got shape \(0,\)"),
        (lambda: given(0.5), r"got shape \(\); use constant"),  # type: ignore[arg-type]
        (lambda: given(["often"]), r"must be numbers"),  # type: ignore[list-item]
        (lambda: constant(0, 0.5), r"num_clients .* got 0"),
        (lambda: constant(2.5, 0.5), r"num_clients .* got 2\.5"),  # type: ignore[arg-type]
        (lambda: constant(2, 0.0), r"p must be above 0 .* got 0"),
        (lambda: two_group(1, 0.0), r"p_low must be above 0 .* got 0"),
        (lambda: two_group(4, 0.1, 1.2), r"p_high .* at most 1, got 1\.2"),
        (lambda: label_correlated([[3, 1]]), r"client 0 has \[3\.0, 1\.0\], which sums to 4"),
        (lambda: label_correlated([[0.5, 0.5], [2.0, -1.0]]), r"client 1 has"),
        (lambda: label_correlated([[float("nan"), 1.0]]), r"client 0 has"),
        (lambda: label_correlated([0.5, 0.5]), r"shape \(num_clients, classes\), got \(2,\)"),
        (lambda: label_correlated([[1.0]], mean=0.0), r"mean .* got 0"),
        (lambda: label_correlated([[1.0]], minimum=0.0), r"minimum .* got 0"),
        (lambda: label_correlated([[1.0]], alpha=0.0), r"alpha.* got 0"),
        (lambda: label_correlated([[1.0]], seed=-3), r"seed .* got -3"),
    ],
)
def test_impossible_values_name_client_value_and_fix(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
