"""The flat model: views, gradients, loading and reading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from turnout.client import FlatModel
from turnout.client.flat_model import to_vector
from turnout.wire import LayoutError, ParameterLayout, as_array


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * 36, 3))


def test_parameters_keep_their_values_and_become_views():
    module = net()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = FlatModel(module)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    model.parameters.add_(1.0)
    for name, tensor in module.state_dict().items():
        changed = torch.equal(tensor, before[name] + 1.0)
        assert changed is not (name in model.buffers)
    assert set(model.buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_gradients_land_in_the_flat_vector_in_state_dict_order():
    torch.manual_seed(0)
    module = net()
    twin = net()
    twin.load_state_dict(module.state_dict())
    model = FlatModel(module)
    x = torch.randn(4, 1, 8, 8)
    for _ in range(2):
        model.gradient.zero_()
        module(x).square().mean().backward()
    twin.zero_grad()
    twin.load_state_dict({**twin.state_dict()})
    twin(x).square().mean().backward()
    expected = torch.cat([p.grad.reshape(-1) for p in twin.parameters()])
    torch.testing.assert_close(model.gradient, expected)


def test_gradients_of_their_own_and_then_views_again_even_after_an_error():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model = FlatModel(module)

    def fail_halfway() -> None:
        with model.own_gradients() as trained:
            module[0](torch.ones(1, 3)).sum().backward()
            assert [tensor.grad is not None for tensor in trained] == [True, True, False, False]
            assert not model.gradient.any()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    module(torch.ones(1, 3)).sum().backward()
    assert torch.equal(model.gradient, torch.cat([p.grad.reshape(-1) for p in module.parameters()]))
    assert model.gradient[-1] == 1.0


def test_frozen_parameters_travel_but_do_not_move():
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    model = FlatModel(module)
    module(torch.ones(1, 3)).sum().backward()
    assert model.layout.size == 8
    assert model.gradient[6:].tolist() == [0.0, 0.0]
    assert model.gradient[:6].tolist() == [1.0] * 6


def test_load_and_record_round_trip_with_buffers():
    model, other = FlatModel(net()), FlatModel(net())
    vector = np.arange(model.layout.size, dtype=np.float32)
    buffers = {
        "1.running_mean": np.array([1.0, 2.0], np.float32),
        "1.running_var": np.array([3.0, 4.0], np.float32),
        "1.num_batches_tracked": np.array(5),
    }
    model.load(model.layout.record(vector, buffers))
    other.load(model.record(model.vector()))
    np.testing.assert_array_equal(other.vector(), vector)
    for name, value in buffers.items():
        np.testing.assert_array_equal(other.buffers[name].numpy(), value)
    sent = model.record(model.vector())
    model.parameters.zero_()
    model.buffers["1.running_mean"].zero_()
    np.testing.assert_array_equal(model.layout.flatten(sent), vector)
    np.testing.assert_array_equal(sent["1.running_mean"].numpy(), buffers["1.running_mean"])


def test_layout_is_that_of_the_state_dict():
    module = net()
    arrays = {name: as_array(tensor.numpy()) for name, tensor in module.state_dict().items()}
    assert FlatModel(module).layout.digest == ParameterLayout.from_arrays(arrays).digest


def test_double_precision_models():
    model = FlatModel(nn.Linear(2, 1).double())
    assert model.parameters.dtype == torch.float64
    assert model.vector().dtype == np.float64


def test_vectors_are_copies():
    model = FlatModel(nn.Linear(2, 1))
    vector = model.vector()
    model.parameters.add_(1.0)
    assert not np.array_equal(vector, to_vector(model.parameters))


def test_tied_parameters_are_refused():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    with pytest.raises(LayoutError, match="are one tensor"):
        FlatModel(module)


def test_mixed_precision_parameters_are_refused():
    with pytest.raises(LayoutError, match=r"float64"):
        FlatModel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))


@pytest.mark.parametrize("mode", [True, False])
def test_train_mode_is_set_on_every_module(mode):
    model = FlatModel(net())
    model.train(mode)
    assert all(module.training is mode for module in model.module.modules())
