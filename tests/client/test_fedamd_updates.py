"""Anchors and miners of FedAMD: the client-side invariants of its card (arXiv 2206.05891)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from turnout.client.minibatches import generator
from turnout.tasks import ClientData, Task

X0 = np.array([0.3, -1.0, 0.7, 0.1, 2.0])
G = np.array([0.2, 0.1, -0.4, 0.0, 0.3])
LR = 0.1


def test_anchor_is_the_full_gradient_and_leaves_no_model(quadratic, ask, gradient):
    answer = ask(quadratic, 1, batch_size=2).train(X0, "anchor")
    assert "arrays" not in answer.content
    np.testing.assert_allclose(answer.read("gradient"), gradient(quadratic, 1, X0), rtol=1e-12)
    assert answer.metrics["num-examples"] == 7


def test_anchor_batch_size_draws_a_seeded_subset(quadratic, ask, gradient):
    client = ask(quadratic, 1, anchor_batch_size=4, seed=9)
    rows = generator(9, 1, 3).choice(7, 4, replace=False)
    answer = client.train(X0, "anchor", server_round=3)
    np.testing.assert_allclose(answer.read("gradient"), gradient(quadratic, 1, X0, rows), rtol=1e-12)


def test_anchor_works_through_large_sets_in_chunks(quadratic, ask, gradient, monkeypatch):
    monkeypatch.setattr(quadratic, "chunk_size", 3)
    answer = ask(quadratic, weight_decay=0.1).train(X0, "anchor")
    np.testing.assert_allclose(answer.read("gradient"), gradient(quadratic, 0, X0) + 0.1 * X0, rtol=1e-12)


def test_miner_against_the_recursion(quadratic, ask, gradient):
    answer = ask(quadratic, 2, lr=LR, batch_size=3, local_steps=6, seed=4).train(
        X0, "miner", records={"bullseye": G}
    )
    rng = generator(4, 2, 1)
    orders = [rng.permutation(7), rng.permutation(7)]
    batches = [order[i : i + 3] for order in orders for i in (0, 3, 6)]
    y = previous = X0
    q = G.copy()
    for rows in batches:
        q = q - gradient(quadratic, 2, previous, rows) + gradient(quadratic, 2, y, rows)
        previous, y = y, y - LR * q
    np.testing.assert_allclose(answer.vector, y, rtol=1e-11)


def test_invariant_4_one_step_is_the_same_for_every_miner(quadratic, ask):
    for k in range(4):
        answer = ask(quadratic, k, lr=LR, local_steps=1).train(X0, "miner", records={"bullseye": G})
        np.testing.assert_array_equal(answer.vector, X0 - LR * G)


def test_invariant_5_fixed_full_batch_telescopes(quadratic, ask, gradient):
    """q_k = g + grad f_i(y_k) - grad f_i(x)."""
    answer = ask(quadratic, lr=LR, batch_size=7, local_steps=8).train(X0, "miner", records={"bullseye": G})
    y = X0
    for _ in range(8):
        y = y - LR * (G + gradient(quadratic, 0, y) - gradient(quadratic, 0, X0))
    np.testing.assert_allclose(answer.vector, y, rtol=1e-11)


def test_invariant_3_fresh_cache_one_step_is_exact_descent(quadratic, ask, gradient):
    exact = np.mean([gradient(quadratic, k, X0) for k in range(4)], axis=0)
    cache = [ask(quadratic, k).train(X0, "anchor").read("gradient") for k in range(4)]
    g = np.mean(cache, axis=0)
    miners = [
        ask(quadratic, k, lr=LR, local_steps=1).train(X0, "miner", records={"bullseye": g}).vector
        for k in range(4)
    ]
    np.testing.assert_allclose(np.mean(miners, axis=0), X0 - LR * exact, rtol=1e-12)


def test_invariant_6_a_homogeneous_fresh_cache_is_exact_local_descent(quadratic, ask):
    client = ask(quadratic, lr=LR, batch_size=7, local_steps=6)
    g = client.train(X0, "anchor").read("gradient")
    mined = client.train(X0, "miner", records={"bullseye": g}).vector
    np.testing.assert_allclose(mined, client.train(X0, "sgd").vector, rtol=1e-12)


def test_invariant_9_the_optimum_is_a_fixed_point(quadratic, ask):
    optimum = quadratic.solution
    cache = [ask(quadratic, k).train(optimum, "anchor").read("gradient") for k in range(4)]
    for k in range(4):
        client = ask(quadratic, k, lr=LR, batch_size=7, local_steps=5)
        moved = client.train(optimum, "miner", records={"bullseye": np.mean(cache, axis=0)}).vector
        np.testing.assert_allclose(moved, optimum, atol=1e-13)


class NormTask(Task):
    """One client, batch norm and an integer buffer, float32."""

    name = "norm"
    num_clients = 1

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        self.data = ClientData(torch.randn(12, 3, generator=rng), torch.randint(2, (12,), generator=rng))

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))

    def client_data(self, client: int) -> ClientData:
        return self.data

    def loss(self, output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output, y)


@pytest.mark.parametrize(("local_update", "moves"), [("sgd", True), ("miner", False)])
def test_batch_norm_statistics_move_only_in_plain_training(ask, local_update, moves):
    client = ask(NormTask(), batch_size=4)
    x = np.linspace(-1, 1, client.layout.size, dtype=np.float32)
    answer = client.train(x, local_update, records={"bullseye": x})
    buffers = client.layout.buffers_of(answer.content["arrays"])
    assert int(buffers["1.num_batches_tracked"]) == (3 if moves else 0)
    assert bool(np.any(buffers["1.running_mean"])) is moves
    # The next client starts from what it receives, not from what this one left.
    again = client.train(x, local_update, records={"bullseye": x})
    np.testing.assert_array_equal(
        again.read("arrays", with_buffers=True), answer.read("arrays", with_buffers=True)
    )
    for name, value in client.layout.buffers_of(again.content["arrays"]).items():
        np.testing.assert_array_equal(value, buffers[name])


def test_an_anchor_differentiates_in_evaluation_mode(ask):
    client = ask(NormTask(), batch_size=4)
    x = np.linspace(-1, 1, client.layout.size, dtype=np.float32)
    found = client.train(x, "anchor").read("gradient")
    model = NormTask().model()
    parts = client.layout.split(x)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(parts[name]))
    model.eval()
    data = NormTask().data
    nn.functional.cross_entropy(model(data.x), data.y).backward()
    expected = np.concatenate([p.grad.numpy().ravel() for p in model.parameters()])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
