"""Partitioners: every example to exactly one client, the same for the same seed, each recipe as stated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.tasks import (
    Dirichlet,
    Iid,
    LabelMix,
    LabelSwap,
    Natural,
    Shards,
    make_partitioner,
)
from turnout.wire import ConfigError, methods

PARTITIONERS = [
    Iid(),
    Dirichlet(alpha=0.1),
    Dirichlet(alpha=100.0, min_examples=3),
    LabelMix(alpha=0.1),
    LabelMix(alpha=0.5, min_examples=2),
    Shards(shards_per_client=2),
    LabelSwap(fraction=0.5),
]


def labels_of(count: int, seed: int = 0, classes: int = 10) -> np.ndarray:
    return np.random.default_rng(seed).integers(classes, size=count)


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=repr)
@settings(max_examples=25, deadline=None)
@given(st.integers(60, 400), st.integers(1, 15), st.integers(0, 2**32))
def test_disjoint_covering_reproducible(partitioner, count, num_clients, seed):
    labels = labels_of(count, seed)
    partition = partitioner.split(labels, num_clients, seed=seed)
    assert len(partition.indices) == num_clients
    np.testing.assert_array_equal(np.sort(np.concatenate(partition.indices)), np.arange(count))
    assert partition.sizes.sum() == count
    assert partition.sizes.min() >= getattr(partitioner, "min_examples", 1)
    again = partitioner.split(labels, num_clients, seed=seed)
    for a, b in zip(partition.indices, again.indices, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(partition.labels, again.labels)
    counts = partition.class_counts(10)
    assert counts.shape == (num_clients, 10)
    np.testing.assert_array_equal(counts.sum(axis=1), partition.sizes)


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=repr)
def test_another_seed_is_another_partition(partitioner):
    labels = labels_of(300)
    first, second = (partitioner.split(labels, 7, seed=seed) for seed in (1, 2))
    assert any(not np.array_equal(a, b) for a, b in zip(first.indices, second.indices, strict=True))


def test_iid_parts_are_equal():
    sizes = Iid().split(labels_of(103), 10, seed=0).sizes
    assert set(sizes) == {10, 11}


def test_dirichlet_alpha_controls_skew():
    labels = labels_of(4000)

    def skew(alpha):
        counts = Dirichlet(alpha).split(labels, 20, seed=3).class_counts(10)
        return (counts.max(axis=1) / counts.sum(axis=1)).mean()

    assert skew(0.1) > 0.5 > skew(1.0) > 0.15 > skew(1000.0)


def test_dirichlet_fills_small_clients_from_the_largest():
    labels = labels_of(2000)
    sparse = Dirichlet(0.05, min_examples=0).split(labels, 40, seed=1)
    filled = Dirichlet(0.05, min_examples=10).split(labels, 40, seed=1)
    assert sparse.sizes.min() < 10
    assert filled.sizes.min() >= 10
    rich = (sparse.sizes >= 10) & (sparse.sizes < sparse.sizes.max() // 2)
    np.testing.assert_array_equal(filled.sizes[rich], sparse.sizes[rich])


def test_label_mix_follows_the_drawn_mixes():
    """Each class is split in proportion to its column of the row-wise Dirichlet draws."""
    labels = labels_of(20_000)
    counts = LabelMix(0.1).split(labels, 30, seed=5).class_counts(10)
    mixes = np.random.default_rng(5).dirichlet(np.full(10, 0.1), size=30)
    expected = mixes / mixes.sum(axis=0) * np.bincount(labels)
    assert np.abs(counts - expected).max() <= 1.0


def test_label_mix_may_leave_clients_empty_and_counts_show_it():
    partition = LabelMix(0.1).split(labels_of(15), 50, seed=0)
    counts = partition.class_counts(10)
    assert (partition.sizes == 0).any()
    np.testing.assert_array_equal(counts.sum(axis=1) == 0, partition.sizes == 0)


def test_shards_give_each_client_few_labels():
    labels = np.repeat(np.arange(10), 40)
    counts = Shards(2).split(labels, 20, seed=0).class_counts(10)
    assert (np.count_nonzero(counts, axis=1) <= 2).all()
    assert set(counts.sum(axis=1)) == {20}


def test_natural_clients_are_the_groups():
    groups = np.array([3, 1, 3, 7, 7, 7])
    partition = Natural().split(np.zeros(6, np.int64), 3, seed=0, groups=groups)
    assert [rows.tolist() for rows in partition.indices] == [[1], [0, 2], [3, 4, 5]]
    larger = Natural(min_examples=2).split(np.zeros(6, np.int64), 2, seed=0, groups=groups)
    assert [rows.tolist() for rows in larger.indices] == [[0, 2], [3, 4, 5]]
    with pytest.raises(ConfigError, match="num_clients=3"):
        Natural().split(np.zeros(6, np.int64), 5, seed=0, groups=groups)
    with pytest.raises(ConfigError, match="client ids"):
        Natural().split(np.zeros(6, np.int64), 3, seed=0)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.6, 1.0])
def test_label_swap_swaps_that_share_of_two_labels(fraction):
    labels = labels_of(3000)
    iid = Iid().split(labels, 6, seed=4)
    swapped = LabelSwap(fraction).split(labels, 6, seed=4)
    for client, rows in enumerate(swapped.indices):
        np.testing.assert_array_equal(rows, iid.indices[client])
        before, after = labels[rows], swapped.labels[rows]
        pair = (8, 9) if client % 2 else (0, 1)
        for old, new in (pair, pair[::-1]):
            of_label = before == old
            assert (after[of_label] == new).sum() == round(fraction * of_label.sum())
            assert set(after[of_label]) <= {old, new}
        others = ~np.isin(before, pair)
        np.testing.assert_array_equal(after[others], before[others])
    assert (np.bincount(labels) == np.bincount(labels_of(3000))).all()  # The given labels stay as they are.


def test_label_pairs_can_be_chosen():
    labels = labels_of(500)
    swapped = make_partitioner("label-swap", fraction=1.0, even=[3, 5], odd=[2, 6]).split(labels, 2, seed=0)
    even, odd = swapped.indices
    assert set(labels[even][swapped.labels[even] == 3]) == {5}
    assert set(labels[odd][swapped.labels[odd] == 6]) == {2}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dirichlet", {"alpha": 0}, "alpha=0"),
        ("dirichlet", {"alpha": "hard"}, "alpha='hard'"),
        ("dirichlet", {"alhpa": 1}, "Did you mean 'alpha'"),
        ("dirchlet", {}, "Did you mean 'dirichlet'"),
        ("shards", {"shards_per_client": 0}, "shards_per_client=0"),
        ("label-swap", {"fraction": 1.2}, "fraction=1.2"),
        ("label-swap", {"even": [1, 1]}, "two different labels"),
        ("label-mix", {"min_examples": -1}, "min_examples=-1"),
    ],
)
def test_bad_options_name_field_value_and_fix(name, options, words):
    with pytest.raises(ConfigError, match=words):
        make_partitioner(name, **options)


def test_too_many_clients_for_the_data():
    with pytest.raises(ConfigError, match="num_clients=50"):
        Dirichlet(min_examples=3).split(labels_of(100), 50, seed=0)
    with pytest.raises(ConfigError, match="num_clients=0"):
        Iid().split(labels_of(100), 0, seed=0)


def test_partitioners_are_registered():
    slugs = {entry.slug for entry in methods("partitioner")}
    assert slugs == {"iid", "dirichlet", "label-mix", "shards", "natural", "label-swap"}
