"""Least-squares tasks: exact answers, the ADMM card's recipe, consistency of loss and closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from turnout.tasks import Grunfeld, Wls
from turnout.wire import ConfigError, ParameterLayout, as_array


def arrays(w):
    return ArrayRecord({"w": as_array(np.asarray(w, dtype=np.float64))})


def test_wls_follows_the_recipe():
    task = Wls(seed=3)
    assert task.num_clients == 100
    assert task.dimension == 128
    counts = np.array([task.num_examples(k) for k in range(100)])
    assert counts.min() >= 51
    assert counts.max() <= 90
    assert counts.mean() == pytest.approx(70.5, abs=3.5)
    means = np.array([d.x.mean() for d in task.designs])
    variances = np.array([d.x.var() for d in task.designs])
    assert means.min() >= -0.55
    assert means.max() <= 0.55
    assert variances.min() >= 0.45
    assert variances.max() <= 1.55
    assert {float(weight) for d in task.designs for weight in d.weights} == {1e4}
    # w* is within noise of a zero-mean unit-power vector, and is the weighted normal equations' solution.
    assert abs(task.solution.mean()) < 1e-3
    assert np.mean(task.solution**2) == pytest.approx(1.0, abs=1e-2)
    curvatures = [task.curvature(k) for k in range(100)]
    exact = np.linalg.solve(sum(a for a, _ in curvatures), sum(b for _, b in curvatures))
    np.testing.assert_allclose(task.solution, exact, rtol=1e-8)


def test_wls_noise_is_standardised_per_client():
    task = Wls(num_clients=30, dimension=4, min_examples=20, max_examples=30, seed=1)
    noise = [d.y - d.x @ task.solution for d in task.designs]
    for residual in noise:
        assert np.sqrt(np.mean(residual**2)) == pytest.approx(0.01, rel=0.1)


def test_wls_is_reproducible_in_float64():
    first, again, other = Wls(seed=1), Wls(seed=1), Wls(seed=2)
    np.testing.assert_array_equal(first.designs[5].x, again.designs[5].x)
    assert not np.array_equal(first.solution, other.solution)
    layout = ParameterLayout.from_arrays(first.initial_arrays())
    assert layout.dtype == np.float64
    np.testing.assert_array_equal(layout.flatten(first.initial_arrays()), np.zeros(128))


def test_nmsd_is_zero_at_the_solution_and_one_at_zero():
    task = Wls(num_clients=20, dimension=16, min_examples=6, max_examples=12)
    assert task.nmsd(task.solution) == 0.0
    assert task.nmsd(np.zeros(16)) == pytest.approx(1.0)
    assert task.nmsd(np.stack([np.zeros(16), task.solution])) == pytest.approx(0.5)
    metrics = task.evaluate(arrays(task.solution))
    assert metrics["nmsd"] == 0.0
    assert metrics["rmse"] == pytest.approx(0.01, rel=0.2)
    assert metrics["loss"] < task.evaluate(arrays(task.solution + 1e-3))["loss"]


def test_batch_losses_estimate_the_objective_without_bias():
    task = Wls(num_clients=2, dimension=6, min_examples=8, max_examples=8)
    data, d = task.client_data(0), task.designs[0]
    w = torch.linspace(-1, 1, 6, dtype=torch.float64)
    objective = float(d.weights @ (d.y - d.x @ w.numpy()) ** 2)
    whole = float(task.loss(data.x @ w, data.y))
    halves = [float(task.loss(data.x[s] @ w, data.y[s])) for s in (slice(0, 4), slice(4, 8))]
    assert whole == pytest.approx(objective, rel=1e-12)
    assert np.mean(halves) == pytest.approx(objective, rel=1e-12)
    a, b = task.curvature(0)
    leaf = w.clone().requires_grad_()
    task.loss(data.x @ leaf, data.y).backward()
    np.testing.assert_allclose(leaf.grad.numpy(), a @ w.numpy() - b, rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_clients": 0}, "num_clients=0"),
        ({"dimension": 1}, "dimension=1"),
        ({"min_examples": 1}, "min_examples=1"),
        ({"min_examples": 90, "max_examples": 51}, "max_examples=51"),
        ({"num_clients": 1}, "dimension=128"),
    ],
)
def test_impossible_wls(options, words):
    with pytest.raises(ConfigError, match=words):
        Wls(**options)


def test_regression_has_no_labels_and_rho_must_be_positive():
    task = Wls(num_clients=3, dimension=4, min_examples=5, max_examples=5)
    with pytest.raises(ConfigError, match="no class labels"):
        task.label_distribution()
    with pytest.raises(ConfigError, match="rho=0"):
        task.admm_solver(0, 0.0)


def test_grunfeld_gives_pooled_least_squares():
    pytest.importorskip("statsmodels", reason="needs Grunfeld: pip install --no-deps statsmodels==0.15.0")
    task = Grunfeld()
    assert task.num_clients == 11
    assert {task.num_examples(k) for k in range(11)} == {20}
    assert "General Motors" in task.client_names
    np.testing.assert_allclose(
        task.coefficients(task.solution), [-38.41005, 0.11453, 0.22751], rtol=0, atol=6e-6
    )
    with pytest.raises(ConfigError, match="num_clients=5"):
        Grunfeld(num_clients=5)
    assert task.nmsd(task.solution) == 0.0
    # Gradient methods can use it: the pooled objective is well conditioned.
    pooled = sum(task.curvature(k)[0] for k in range(11)) / 11
    assert np.linalg.cond(pooled) < 50


def test_federated_descent_reaches_grunfelds_answer(ask):
    pytest.importorskip("statsmodels", reason="needs Grunfeld: pip install --no-deps statsmodels==0.15.0")
    task = Grunfeld()
    clients = [ask(task, k, lr=0.2, batch_size=20, local_steps=1) for k in range(11)]
    w = np.zeros(3)
    for _ in range(200):
        w = np.mean([client.train(w).vector for client in clients], axis=0)
    np.testing.assert_allclose(task.coefficients(w), [-38.41005, 0.11453, 0.22751], rtol=1e-3)
