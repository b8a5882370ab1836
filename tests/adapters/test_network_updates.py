"""Dense averaging of TeRA on the server: exact inside, fitted by alternating least squares outside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from turnout.peft import TeraConfig, attach
from turnout.peft.tera import Tera
from turnout.strategies.network_updates import FrozenNetwork, NetworkUpdates
from turnout.wire import ConfigError, ParameterLayout, as_array

D_OUT, D_IN, SCALE = 12, 20, 2.0
MODES = {"out_modes": (3, 4), "in_modes": (5, 4), "ranks": (3, 4, 4, 4)}
Array = NDArray[np.floating[Any]]


def tera(seed: int | None = None) -> Tera:
    """Return a layer with diagonals of ``seed`` (None: as they start)."""
    config = TeraConfig(train_modes="all", aggregation="exact-als", scale=SCALE, **MODES)  # type: ignore[arg-type]
    (layer,) = attach(nn.Sequential(nn.Linear(D_IN, D_OUT)), config).layers.values()
    assert isinstance(layer, Tera)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for d in layer.tera_d:
                d.copy_(1 + 0.5 * torch.randn(d.shape, generator=generator))
    return layer


def bound(layer: Tera) -> tuple[NetworkUpdates, ParameterLayout, Array]:
    network = FrozenNetwork(
        layer.tera_core.double().numpy(), [f.double().numpy() for f in layer.factors], layer.outputs
    )
    arrays = {"head.bias": as_array(np.ones(2, np.float32))}
    arrays |= {f"0.tera_d.{n}": as_array(d.detach().numpy()) for n, d in enumerate(layer.tera_d)}
    layout = ParameterLayout.from_arrays(arrays)
    updates = NetworkUpdates(lambda: {"0": network}, "tera_d", SCALE)
    updates.bind(layout, layout.flatten(arrays))
    return updates, layout, layout.flatten(arrays)


def vector(layer: Tera) -> Array:
    return np.concatenate([np.ones(2, np.float32), *(d.detach().numpy() for d in layer.tera_d)])


def dense(layer: Tera) -> Array:
    made: Array = layer.delta_weight().detach().numpy()
    return made


def test_inside_is_the_layers_own_dense_update() -> None:
    layer = tera(seed=1)
    updates, _, flat = bound(layer)
    inside = updates.inside(flat)
    np.testing.assert_allclose(inside[2:].reshape(D_OUT, D_IN), dense(layer), atol=1e-5)
    np.testing.assert_array_equal(updates.outside(inside), flat)  # Known: not fitted again.


def test_the_mean_of_dense_updates_is_exact_and_its_fit_beats_the_mean_of_the_diagonals() -> None:
    sent, clients = tera(seed=0), [tera(seed=k) for k in (1, 2, 3)]
    updates, _, _ = bound(sent)
    mean = np.mean([updates.inside(vector(c)) for c in clients], axis=0, dtype=np.float32)
    exact = np.mean([dense(c) for c in clients], axis=0)
    np.testing.assert_allclose(mean[2:].reshape(D_OUT, D_IN), exact, atol=1e-5)
    fitted = updates.inside(updates.outside(mean))[2:].reshape(D_OUT, D_IN)
    naive = updates.inside(np.mean([vector(c) for c in clients], axis=0))[2:].reshape(D_OUT, D_IN)
    errors = [float(np.linalg.norm(found - exact)) for found in (fitted, naive)]
    assert errors[0] < 0.8 * errors[1], errors
    np.testing.assert_allclose(updates.project(mean)[2:].reshape(D_OUT, D_IN), fitted, atol=1e-6)


def test_opposite_scalings_of_two_diagonals_do_not_cancel() -> None:
    """The gauge (c d_1, d_2 / c) leaves a client's update alone, but not the mean of the diagonals."""
    clients = [tera(seed=1), tera(seed=1)]
    with torch.no_grad():
        for d in clients[1].tera_d[:2]:
            d.neg_()
    updates, _, _ = bound(tera(seed=0))
    found = updates.outside(np.mean([updates.inside(vector(c)) for c in clients], axis=0, dtype=np.float32))
    exact = dense(clients[0])
    error = np.linalg.norm(updates.inside(found)[2:].reshape(D_OUT, D_IN) - exact) / np.linalg.norm(exact)
    assert error < 0.02
    naive = updates.inside(np.mean([vector(c) for c in clients], axis=0))
    assert not naive[2:].any()


def test_from_zero_the_first_diagonal_moves_first_and_nothing_dies() -> None:
    updates, _, flat = bound(tera())
    target = tera(seed=4)
    found = updates.outside(updates.inside(vector(target)))
    exact = dense(target)
    error = np.linalg.norm(updates.inside(found)[2:].reshape(D_OUT, D_IN) - exact) / np.linalg.norm(exact)
    assert error < 0.1
    still = updates.inside(flat)
    still[0] += 1  # No update at all: the diagonals stay where they were.
    np.testing.assert_allclose(updates.outside(still)[2:], flat[2:], atol=1e-6)


def test_a_gradient_comes_back_as_the_same_motion_of_the_update() -> None:
    layer = tera(seed=5)
    updates, _, flat = bound(layer)
    gradient = np.random.default_rng(0).standard_normal(flat.shape).astype(np.float32)
    inside = updates.gradient_inside(gradient)
    # The derivative of the update, by differences in float64.
    wide = flat.astype(np.float64)
    moved = (updates.inside(wide + 1e-6 * gradient) - updates.inside(wide - 1e-6 * gradient)) / 2e-6
    np.testing.assert_allclose(inside, moved, atol=1e-4)
    back = updates.gradient_outside(inside)
    np.testing.assert_allclose(updates.gradient_inside(back), inside, atol=1e-4)
    assert np.linalg.norm(back) <= np.linalg.norm(gradient) * (1 + 1e-5)  # The least that does it.


def test_a_model_without_networks_and_options_that_do_not_go_together() -> None:
    layout = ParameterLayout.from_arrays({"w": as_array(np.zeros(3, np.float32))})
    with pytest.raises(ConfigError, match="aggregation='exact-als' needs networks with diagonals 'tera_d'"):
        NetworkUpdates(dict, "tera_d", 1.0).bind(layout, np.zeros(3, np.float32))
    with pytest.raises(ConfigError, match="train_modes='all'"):
        TeraConfig(aggregation="exact-als")
    with pytest.raises(ConfigError, match="exact-als"):
        TeraConfig(train_modes="all", aggregation="exact-svd")
    assert TeraConfig().aggregation == "exact"
    assert TeraConfig(train_modes="all").aggregation == "approximate"
