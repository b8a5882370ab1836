"""The ClientApp builder: settings, requests it refuses, determinism, threads, evaluation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import cloudpickle
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

import turnout.client
import turnout.tasks
from turnout.client import client_app
from turnout.tasks import Digits, GaussianMixture
from turnout.wire import ConfigError, DataError, LayoutError, as_array, methods
from turnout.wire.flower import new_context, request

# (settings, words that the error must have: field, value, fix)
BAD_SETTINGS = [
    ({"lr": 0.0}, ["lr=0.0", "> 0"]),
    ({"lr": -1}, ["lr=-1", "> 0"]),
    ({"lr": float("nan")}, ["lr=nan", "> 0"]),
    ({"momentum": 1.0}, ["momentum=1.0", "< 1"]),
    ({"weight_decay": -0.1}, ["weight_decay=-0.1", ">= 0"]),
    ({"batch_size": 0}, ["batch_size=0", ">= 1"]),
    ({"batch_size": 2.5}, ["batch_size=2.5", "whole"]),
    ({"local_steps": 0}, ["local_steps=0", ">= 1"]),
    ({"local_epochs": 0}, ["local_epochs=0", ">= 1"]),
    ({"local_steps": 2, "local_epochs": 1}, ["local_steps=2", "local_epochs=1", "one of them"]),
    ({"anchor_batch_size": 0}, ["anchor_batch_size=0", ">= 1"]),
    ({"optimizer": "adm"}, ["optimizer", "'adm'", "adam"]),
    ({"optimizer": "lbfgs"}, ["optimizer", "'lbfgs'"]),
    ({"optimizer": "adam", "momentum": 0.9}, ["momentum=0.9", "adam", "momentum=0"]),
    ({"reference": "fress"}, ["reference", "fress", "fresh"]),
    ({"seed": -1}, ["seed=-1", ">= 0"]),
    ({"device": "tpux"}, ["device='tpux'", "cpu"]),
]


@pytest.mark.parametrize(("settings", "words"), BAD_SETTINGS)
def test_bad_settings_are_refused_when_the_app_is_built(quadratic, settings, words):
    with pytest.raises(ConfigError) as caught:
        client_app(quadratic, **settings)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_a_missing_gpu_is_an_error(quadratic):
    with pytest.raises(ConfigError, match="no CUDA device"):
        client_app(quadratic, device="cuda")


def test_every_local_update_is_registered_with_its_paper():
    found = {entry.slug: entry.paper for entry in methods("local-update")}
    assert found == {
        "sgd": "1602.05629",
        "prox": "1812.06127",
        "dyn": "2111.04263",
        "scaffold": "1910.06378",
        "anchor": "2206.05891",
        "miner": "2206.05891",
        "admm": "2409.13451",
        "dual-admm": "2409.13451",
        "bo-rep": "2401.09587",
        "bo-rep-local-upper": "2401.09587",
        "eggroll": "2511.16652",
        "field-space": "2212.02846",
    }


X0 = np.linspace(-1.0, 1.0, 5)
EVERY_UPDATE = [
    ("sgd", {}, None),
    ("prox", {"proximal-mu": 0.1}, None),
    ("dyn", {"dyn-alpha": 0.1}, None),
    ("scaffold", {}, "control"),
    ("anchor", {}, None),
    ("miner", {}, "bullseye"),
    ("admm", {"rho": 1.0}, None),
    ("admm", {"rho": 1.0, "continual": True}, None),
    ("admm", {"rho": 1.0, "extrapolate": True}, None),
    ("dual-admm", {"rho": 1.0}, None),
]


@pytest.mark.parametrize(("local_update", "config", "record"), EVERY_UPDATE)
@pytest.mark.parametrize("closed_form", [True, False])
def test_replies_are_a_function_of_seed_client_and_round(
    quadratic, ask, local_update, config, record, closed_form
):
    def run(seed=1, client=1, first_round=1):
        asked = ask(quadratic, client, batch_size=3, seed=seed, anchor_batch_size=4, closed_form=closed_form)
        records = {"initial": X0} | ({record: 0.1 * X0} if record else {})
        for server_round in (first_round, first_round + 1):
            answer = asked.train(X0, local_update, server_round=server_round, config=config, records=records)
        sent = answer.read("gradient" if local_update == "anchor" else "arrays")
        assert np.isfinite(sent).all()
        assert np.isfinite(answer.metrics["train-loss"])
        return sent

    np.testing.assert_array_equal(run(), run())
    assert not np.array_equal(run(), run(client=2))
    if closed_form is False or "admm" not in local_update:
        assert not np.array_equal(run(), run(seed=2))
        assert not np.array_equal(run(), run(first_round=3))


@pytest.mark.parametrize(("local_update", "config", "record"), EVERY_UPDATE)
def test_requests_are_shared_and_never_changed(quadratic, ask, local_update, config, record):
    asked = ask(quadratic, batch_size=3, closed_form=False)
    x = X0.copy()
    shared = asked.layout.record(x)
    content = RecordDict({"arrays": shared})
    extra = 0.1 * X0
    if record:
        content[record] = asked.layout.record(extra)
    content["config"] = ConfigRecord({"server-round": 1, "local-update": local_update, **config})
    for client in (0, 1):
        context = new_context(node_id=client, node_config={"partition-id": client})
        asked.app(request(content, dst_node_id=client), context)
    np.testing.assert_array_equal(x, X0)
    np.testing.assert_array_equal(extra, 0.1 * X0)
    assert set(content) == {"arrays", "config"} | ({record} if record else set())


def test_a_client_without_examples_says_so(ask):
    task = GaussianMixture(train_examples=12, num_clients=50)
    empty = next(k for k in range(50) if task.num_examples(k) == 0)
    x = np.zeros(ask(task).layout.size, np.float32)
    for message_type in ("train", "evaluate"):
        with pytest.raises(DataError, match=f"client {empty} .* no training examples.*min_examples"):
            ask(task, empty).train(x, message_type=message_type)


@pytest.mark.parametrize("client", [-1, 4])
def test_an_unknown_client_says_so(quadratic, ask, client):
    with pytest.raises(ConfigError, match=f"partition-id={client}.*0 to 3"):
        ask(quadratic, client).train(X0)


def test_node_id_stands_in_for_a_missing_partition_id(quadratic, ask):
    asked = ask(quadratic, 2)
    asked.context = new_context(node_id=2, node_config={})
    assert asked.train(X0).metrics["client-id"] == 2


def test_an_unknown_local_update_suggests_the_nearest(quadratic, ask):
    with pytest.raises(ConfigError, match="Did you mean 'scaffold'"):
        ask(quadratic).train(X0, "scafold")


def test_a_model_of_other_shape_is_refused(quadratic, ask):
    asked = ask(quadratic)
    content = RecordDict({"arrays": ArrayRecord({"w": as_array(np.zeros(6))})})
    content["config"] = ConfigRecord({"server-round": 1})
    with pytest.raises(LayoutError, match="shape"):
        asked.app(request(content, dst_node_id=0), asked.context)
    with pytest.raises(LayoutError, match="'arrays'"):
        asked.app(request(RecordDict({"config": content["config"]}), dst_node_id=0), asked.context)
    with pytest.raises(ConfigError, match="server-round"):
        asked.app(request(RecordDict({"arrays": asked.layout.record(X0)}), dst_node_id=0), asked.context)


def test_evaluate_reports_the_received_model_on_own_data(ask):
    task = Digits(num_clients=5, alpha=0.3)
    asked = ask(task, 3)
    x = np.random.default_rng(0).standard_normal(asked.layout.size).astype(np.float32)
    metrics = asked.train(x, message_type="evaluate").metrics
    assert metrics["num-examples"] == task.num_examples(3)
    assert metrics["client-id"] == 3
    model, data = task.model(), task.client_data(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(torch.tensor(asked.layout.split(x)[name]))
        output = model(data.x)
    assert metrics["accuracy"] == pytest.approx(float((output.argmax(1) == data.y).double().mean()))
    assert metrics["loss"] == pytest.approx(float(task.loss(output, data.y)), rel=1e-5)


def test_threads_give_the_same_bits_as_one_after_the_other():
    task = Digits(num_clients=8, alpha=0.5, model="cnn")
    app = client_app(task, local_steps=4, batch_size=16)
    arrays = task.initial_arrays()

    def train(client):
        config = ConfigRecord({"server-round": 2})
        message = request(RecordDict({"arrays": arrays, "config": config}), dst_node_id=client)
        reply = app(message, new_context(node_id=client, node_config={"partition-id": client}))
        return np.concatenate([a.numpy().ravel() for a in reply.content["arrays"].values()])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        serial = [train(k) for k in range(8)]
        with ThreadPoolExecutor(4) as pool:
            parallel = list(pool.map(train, range(8)))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(serial, parallel, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_app_can_be_sent_to_another_process(quadratic, ask):
    asked = ask(quadratic, batch_size=3)
    here = asked.train(X0).vector
    asked.app = cloudpickle.loads(cloudpickle.dumps(asked.app))
    np.testing.assert_array_equal(asked.train(X0).vector, here)


def test_training_leaves_torchs_global_generator_alone(ask):
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    task = Digits(num_clients=3)
    asked = ask(task)
    asked.train(np.zeros(asked.layout.size, np.float32))
    task.evaluate(task.initial_arrays())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("package", "at_once"), [(turnout.client, 0), (turnout.tasks, 4)])
def test_names_that_load_when_asked_for_are_all_there(package: ModuleType, at_once: int):
    assert set(package._HOMES) <= set(package.__all__)
    assert len(package.__all__) == len(package._HOMES) + at_once
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018 - the access is the test
