"""Local updates that descend from the received model, each against its formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from turnout.client.minibatches import generator
from turnout.wire import ConfigError
from turnout.wire.flower import request

X0 = np.array([0.3, -1.0, 0.7, 0.1, 2.0])
LR = 0.2


def batch_rows(count, batch_size, *, seed, client, server_round, epochs):
    """Rows of each minibatch, as documented: each epoch's permutation cut into batches."""
    rng = generator(seed, client, server_round)
    rows = []
    for _ in range(epochs):
        order = rng.permutation(count)
        rows += [order[i : i + batch_size] for i in range(0, count, batch_size)]
    return rows


def test_sgd_is_minibatch_descent(quadratic, ask, gradient):
    answer = ask(quadratic, 2, lr=LR, batch_size=3, local_epochs=2, seed=5).train(X0, server_round=4)
    y, losses = X0.copy(), []
    for rows in batch_rows(7, 3, seed=5, client=2, server_round=4, epochs=2):
        d = quadratic.designs[2]
        losses.append(7 / len(rows) * d.weights[rows] @ (d.x[rows] @ y - d.y[rows]) ** 2)
        y = y - LR * gradient(quadratic, 2, y, rows)
    np.testing.assert_allclose(answer.vector, y, rtol=1e-12)
    assert answer.metrics["train-loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert answer.metrics["num-examples"] == 7
    assert answer.metrics["client-id"] == 2
    assert answer.metrics["train-seconds"] > 0


def test_local_steps_are_counted_across_epochs(quadratic, ask, gradient):
    answer = ask(quadratic, lr=LR, batch_size=3, local_steps=4, seed=1).train(X0)
    y = X0.copy()
    for rows in batch_rows(7, 3, seed=1, client=0, server_round=1, epochs=2)[:4]:
        y = y - LR * gradient(quadratic, 0, y, rows)
    np.testing.assert_allclose(answer.vector, y, rtol=1e-12)


def test_full_batches_keep_the_sets_own_order(quadratic, ask, gradient):
    answer = ask(quadratic, lr=LR, batch_size=7, local_steps=3).train(X0)
    y = X0.copy()
    for _ in range(3):
        y = y - LR * gradient(quadratic, 0, y)
    np.testing.assert_allclose(answer.vector, y, rtol=1e-12)


def test_momentum_and_weight_decay_are_those_of_torch(quadratic, ask):
    settings = {"lr": LR, "momentum": 0.9, "weight_decay": 0.01}
    answer = ask(quadratic, batch_size=7, local_steps=5, **settings).train(X0)
    model, data = quadratic.model(), quadratic.client_data(0)
    with torch.no_grad():
        model.w.copy_(torch.tensor(X0))
    reference = torch.optim.SGD(model.parameters(), **settings)
    for _ in range(5):
        reference.zero_grad()
        quadratic.loss(model(data.x), data.y).backward()
        reference.step()
    np.testing.assert_allclose(answer.vector, model.w.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("name", ["Adam", "adamw", "rmsprop", "Adagrad", "NAdam", "adafactor"])
def test_any_torch_optimizer_runs_on_the_flat_parameter(quadratic, ask, name):
    answer = ask(quadratic, optimizer=name, lr=0.05, batch_size=7, local_steps=3).train(X0)
    kinds = {k.lower(): v for k, v in vars(torch.optim).items()}
    leaf = torch.tensor(X0, requires_grad=True)
    reference, data = kinds[name.lower()]([leaf], lr=0.05), quadratic.client_data(0)
    for _ in range(3):
        reference.zero_grad()
        quadratic.loss(data.x @ leaf, data.y).backward()
        reference.step()
    np.testing.assert_allclose(answer.vector, leaf.detach().numpy(), rtol=1e-12)


def test_optimizer_state_starts_anew_each_round(quadratic, ask):
    client = ask(quadratic, optimizer="adam", lr=0.05, batch_size=7, local_steps=3)
    first = client.train(X0, server_round=1).vector
    np.testing.assert_array_equal(client.train(X0, server_round=2).vector, first)


def test_the_request_may_set_the_step_size(quadratic, ask, gradient):
    answer = ask(quadratic, lr=LR, batch_size=7, local_steps=1).train(X0, config={"lr": 0.03})
    np.testing.assert_allclose(answer.vector, X0 - 0.03 * gradient(quadratic, 0, X0), rtol=1e-12)


def test_prox_adds_the_proximal_pull(quadratic, ask, gradient):
    mu = 0.7
    client = ask(quadratic, 1, lr=LR, batch_size=7, local_steps=4)
    answer = client.train(X0, "prox", config={"proximal-mu": mu})
    y = X0.copy()
    for _ in range(4):
        y = y - LR * (gradient(quadratic, 1, y) + mu * (y - X0))
    np.testing.assert_allclose(answer.vector, y, rtol=1e-12)


def test_prox_with_mu_zero_is_sgd_bit_for_bit(quadratic, ask):
    client = ask(quadratic, batch_size=3, local_epochs=2)
    plain = client.train(X0).vector
    np.testing.assert_array_equal(client.train(X0, "prox", config={"proximal-mu": 0.0}).vector, plain)


def test_flowers_fedprox_needs_no_local_update_name(quadratic, ask):
    client = ask(quadratic, lr=LR, batch_size=7, local_steps=4)
    named = client.train(X0, "prox", config={"proximal-mu": 0.7}).vector
    content = RecordDict({"arrays": client.layout.record(X0.copy())})
    content["config"] = ConfigRecord({"server-round": 1, "proximal-mu": 0.7})
    reply = client.app(request(content, dst_node_id=1), client.context)
    np.testing.assert_array_equal(client.layout.flatten(reply.content["arrays"]), named)


def test_dyn_over_two_rounds(quadratic, ask, gradient):
    alpha, client = 0.3, ask(quadratic, lr=LR, batch_size=7, local_steps=3)
    g, x = np.zeros(5), X0
    for server_round in (1, 2):
        y = x.copy()
        for _ in range(3):
            y = y - LR * (gradient(quadratic, 0, y) - g + alpha * (y - x))
        g = g - alpha * (y - x)
        answer = client.train(x, "dyn", server_round=server_round, config={"dyn-alpha": alpha})
        np.testing.assert_allclose(answer.vector, y, rtol=1e-11)
        x = y + 0.1


def test_dyn_regulariser_becomes_the_local_gradient(quadratic, ask, gradient):
    """At an exact local solution g_i = grad f_i(y), FedDyn's first-order condition."""
    client = ask(quadratic, lr=LR, batch_size=7, local_steps=4000)
    answer = client.train(X0, "dyn", config={"dyn-alpha": 0.3})
    state = client.context.state["turnout.dyn.vectors"]["regulariser"].numpy()
    np.testing.assert_allclose(state, gradient(quadratic, 0, answer.vector), atol=1e-12)


def test_scaffold_option_two_over_two_rounds(quadratic, ask, gradient):
    client = ask(quadratic, lr=LR, batch_size=3, local_epochs=1, seed=3)
    c_i, x = np.zeros(5), X0
    c = np.array([0.1, -0.2, 0.3, 0.0, 0.5])
    for server_round in (1, 2):
        y, raw = x.copy(), []
        for rows in batch_rows(7, 3, seed=3, client=0, server_round=server_round, epochs=1):
            raw.append(gradient(quadratic, 0, y, rows))
            y = y - LR * (raw[-1] - c_i + c)
        answer = client.train(x, "scaffold", server_round=server_round, records={"control": c})
        np.testing.assert_allclose(answer.vector, y, rtol=1e-12)
        # Option II equals the mean of the raw minibatch gradients on the path.
        np.testing.assert_allclose(answer.read("control"), np.mean(raw, axis=0) - c_i, rtol=1e-10, atol=1e-12)
        c_i = c_i + answer.read("control")
        x, c = y, c + 0.1


def test_first_round_starts_stateful_updates_afresh(quadratic, ask):
    client = ask(quadratic, lr=LR, batch_size=7, local_steps=3)
    config = {"dyn-alpha": 0.3}
    first = client.train(X0, "dyn", server_round=1, config=config).vector
    later = client.train(X0, "dyn", server_round=2, config=config).vector
    again = client.train(X0, "dyn", server_round=1, config=config).vector
    assert not np.array_equal(first, later)
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(("local_update", "record"), [("scaffold", "control"), ("miner", "bullseye")])
@pytest.mark.parametrize("options", [{"optimizer": "adam"}, {"momentum": 0.9}])
def test_updates_defined_by_plain_sgd_refuse_others(quadratic, ask, local_update, record, options):
    with pytest.raises(ConfigError, match="use optimizer='sgd'"):
        ask(quadratic, **options).train(X0, local_update, records={record: X0})


@pytest.mark.parametrize(
    ("local_update", "config", "missing"),
    [
        ("prox", {}, "proximal-mu"),
        ("dyn", {}, "dyn-alpha"),
        ("dyn", {"dyn-alpha": 0.0}, "dyn-alpha"),
        ("scaffold", {}, "control"),
        ("miner", {}, "bullseye"),
        ("admm", {}, "rho"),
        ("dual-admm", {"rho": -1.0}, "rho"),
    ],
)
def test_what_the_strategy_must_send(quadratic, ask, local_update, config, missing):
    with pytest.raises(ConfigError, match=missing):
        ask(quadratic).train(X0, local_update, config=config)
