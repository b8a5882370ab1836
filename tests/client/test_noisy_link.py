"""The noisy link: one seeded draw per transmitted vector, and nothing at all at sigma 0."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from turnout.client import noisy_link
from turnout.wire import ConfigError, ParameterLayout, as_array, find
from turnout.wire.flower import new_context, reply, request

CLIENT, ROUND = 3, 5


def record(value: float, size: int = 4) -> ArrayRecord:
    return ArrayRecord(
        {
            "w": as_array(np.full(size, value, np.float32)),
            "b": as_array(np.full(2, 10 * value, np.float32)),
            "count": as_array(np.array(7)),
            "bn.running_mean": as_array(np.ones(2, np.float32)),
        }
    )


def send(mod, *, message_type="train", server_round=ROUND, client=CLIENT, extras=()):
    """Return what the client saw and what the server gets; the client echoes model and gradient."""
    content = RecordDict({"arrays": record(1.0), "config": ConfigRecord({"server-round": server_round})})
    for key in extras:
        content[key] = record(2.0)
    message = request(content, dst_node_id=99, message_type=message_type)
    seen = {}

    def app(received, context):
        seen["content"] = received.content
        answer = RecordDict(
            {"arrays": record(3.0), "gradient": record(4.0), "metrics": MetricRecord({"a": 1})}
        )
        seen["reply"] = reply(answer, to=received)
        seen["answer"] = answer
        return seen["reply"]

    result = mod(message, new_context(node_id=99, node_config={"partition-id": client}), app)
    assert message.content is content  # What engines and other clients hold is not replaced.
    return seen["content"], result.content, seen["answer"]


def flat(arrays):
    return ParameterLayout.from_arrays(arrays).flatten(arrays)


def draw(seed, direction, key, size=6, server_round=ROUND, client=CLIENT):
    rng = np.random.default_rng([seed, direction, server_round, client, zlib.crc32(key.encode())])
    return rng.standard_normal(size).astype(np.float32)


def test_exactly_one_draw_per_vector_and_direction():
    seen, got, _ = send(noisy_link(0.5, 0.25, seed=8), extras=["bullseye"])
    for content, key, value, sigma, direction in (
        (seen, "arrays", 1.0, 0.25, 0),
        (seen, "bullseye", 2.0, 0.25, 0),
        (got, "arrays", 3.0, 0.5, 1),
        (got, "gradient", 4.0, 0.5, 1),
    ):
        clean = np.array([value] * 4 + [10 * value] * 2, np.float32)
        np.testing.assert_allclose(flat(content[key]) - clean, sigma * draw(8, direction, key), atol=1e-5)


def test_buffers_metrics_and_the_agreed_initial_model_are_left_alone():
    seen, got, answer = send(noisy_link(0.5, 0.5), extras=["initial"])
    assert flat(seen["initial"]).tolist() == [2.0] * 4 + [20.0] * 2
    for content in (seen, got):
        assert content["arrays"]["count"].numpy() == 7
        assert content["arrays"]["bn.running_mean"].numpy().tolist() == [1.0, 1.0]
    assert got["metrics"] is answer["metrics"]
    assert flat(answer["arrays"]).tolist() == [3.0] * 4 + [30.0] * 2


def test_zero_sigma_is_no_mod_bit_for_bit():
    seen, got, answer = send(noisy_link(0.0, 0.0))
    assert got is answer
    assert flat(seen["arrays"]).tolist() == [1.0] * 4 + [10.0] * 2
    up_only, got, _ = send(noisy_link(1.0, 0.0))
    assert flat(up_only["arrays"]).tolist() == [1.0] * 4 + [10.0] * 2
    assert flat(got["arrays"]).tolist() != [3.0] * 4 + [30.0] * 2


@pytest.mark.parametrize(
    ("first", "second"),
    [({"seed": 1}, {"seed": 2}), ({"server_round": 1}, {"server_round": 2}), ({"client": 1}, {"client": 2})],
)
def test_noise_is_seeded_by_seed_round_and_client(first, second):
    def run(seed=0, **where):
        return flat(send(noisy_link(0.5, 0.5, seed=seed), **where)[1]["arrays"])

    np.testing.assert_array_equal(run(**first), run(**first))
    assert not np.array_equal(run(**first), run(**second))


def test_relative_noise_scales_with_each_tensors_rms():
    seen, _, _ = send(noisy_link(0.0, 0.1, seed=2, relative=True))
    scale = np.array([1.0] * 4 + [10.0] * 2, np.float32)
    np.testing.assert_allclose(flat(seen["arrays"]), scale + 0.1 * scale * draw(2, 0, "arrays"), rtol=1e-5)


def test_variance_is_sigma_squared():
    mod = noisy_link(0.0, 0.1, seed=1)
    noise = [flat(send(mod, server_round=r)[0]["arrays"])[:4] - 1.0 for r in range(1, 1001)]
    assert np.var(noise) == pytest.approx(0.01, rel=0.1)
    assert abs(np.mean(noise)) < 0.01


def test_only_training_crosses_the_noisy_link():
    for message_type in ("evaluate", "query"):
        seen, got, answer = send(noisy_link(1.0, 1.0), message_type=message_type)
        assert got is answer
        assert flat(seen["arrays"]).tolist() == [1.0] * 4 + [10.0] * 2


@pytest.mark.parametrize("field", ["sigma_up", "sigma_down"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "loud"])
def test_bad_sigmas_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        noisy_link(**{field: value})


def test_an_unnumbered_round_is_refused():
    with pytest.raises(ConfigError, match="server-round"):
        send(noisy_link(1.0), server_round="five")


def test_the_link_is_registered():
    assert find("link", "noisy").target is noisy_link


def test_a_noisy_client_hears_and_sends_noise(quadratic, ask):
    """One downlink draw enters the update, one uplink draw is added to the reply."""
    x = np.linspace(-1, 1, 5)
    noisy = ask(quadratic, CLIENT, local_steps=1, batch_size=7, mods=[noisy_link(0.2, 0.3, seed=4)])
    plain = ask(quadratic, CLIENT, local_steps=1, batch_size=7)
    down, up = (
        np.random.default_rng([4, direction, ROUND, CLIENT, zlib.crc32(b"arrays")]).standard_normal(5)
        for direction in (0, 1)
    )
    expected = plain.train(x + 0.3 * down, server_round=ROUND).vector + 0.2 * up
    np.testing.assert_allclose(noisy.train(x, server_round=ROUND).vector, expected, rtol=1e-12)
