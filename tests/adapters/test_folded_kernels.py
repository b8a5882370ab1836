"""Exact averaging of SNELLA on the server: sparse updates into the weight, kernels back to their start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from turnout.peft import SnellaConfig, attach
from turnout.peft.snella import Snella
from turnout.strategies.folded_kernels import FoldedKernels, kernel, sparse_square
from turnout.wire import CheckpointError, ConfigError, ParameterLayout, as_array

Array = NDArray[np.floating[Any]]
D_OUT, D_IN = 10, 14


def snella(seed: int = 0, **options: Any) -> Snella:
    config = SnellaConfig(r=4, kernel_scale=1.0, total_step=10, aggregation="exact-fold", **options)
    (layer,) = attach(nn.Sequential(nn.Linear(D_IN, D_OUT)), config).layers.values()
    assert isinstance(layer, Snella)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in layer.factors[: 5 if seed else 0]:  # Seed 0: as it starts.
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return layer


def bound(layer: Snella) -> tuple[FoldedKernels, Array]:
    arrays = {f"0.{name}": as_array(p.detach().numpy()) for name, p in own(layer).items()}
    layout = ParameterLayout.from_arrays(arrays)
    kernels = FoldedKernels(layer.config.kernel_scale)
    kernels.bind(layout, layout.flatten(arrays))
    kernels.decided({"0.num_kept": layer.num_kept.numpy()})
    return kernels, np.array(layout.flatten(arrays))


def own(layer: Snella) -> dict[str, nn.Parameter]:
    return {n: p for n, p in layer.named_parameters() if not n.startswith("base_layer")}


def vector(layer: Snella) -> Array:
    return np.concatenate([p.detach().numpy().reshape(-1) for p in own(layer).values()])


@pytest.mark.parametrize("competition", [True, False])
@pytest.mark.parametrize("kept", [0, 1, 60, D_OUT * D_IN])
def test_the_server_has_the_layers_kernel(competition: bool, kept: int) -> None:
    layer = snella(seed=3, competition=competition)
    tensors = [p.detach().double().numpy() for p in layer.factors]
    k = kernel(1.0, *tensors)
    np.testing.assert_allclose(k, layer.kernel().detach().numpy(), atol=1e-5)
    layer.num_kept.fill_(kept)
    sparse = layer.delta_weight() - layer.folded
    np.testing.assert_allclose(sparse_square(k, kept).T, sparse.detach().numpy(), atol=1e-5)
    assert int((sparse_square(k, kept) != 0).sum()) == kept


def test_a_gamma_of_zero_is_the_layers_too() -> None:
    layer = snella(seed=3)
    with torch.no_grad():
        layer.gamma.fill_(-1e-5)
    k = kernel(1.0, *(p.detach().double().numpy() for p in layer.factors))
    np.testing.assert_allclose(k, layer.kernel().detach().numpy(), atol=1e-4)


def test_the_mean_is_that_of_the_dense_updates_and_the_next_round_starts_from_it() -> None:
    sent, clients = snella(), [snella(seed=k) for k in (1, 2, 3)]
    kernels, flat = bound(sent)
    assert not sent.delta_weight().any()
    mean = np.mean([kernels.inside(vector(c)) for c in clients], axis=0, dtype=np.float64)
    exact = np.mean([c.delta_weight().detach().numpy() for c in clients], axis=0, dtype=np.float64)
    out = kernels.outside(mean.astype(np.float32))
    with torch.no_grad():  # What clients make of the model that the server sends next.
        for (name, p), piece in zip(own(sent).items(), np.split(out, cuts(sent)), strict=True):
            assert name == "folded" or np.array_equal(piece, p.detach().numpy().reshape(-1)), name
            p.copy_(torch.from_numpy(piece).reshape(p.shape))
    np.testing.assert_allclose(sent.delta_weight().detach().numpy(), exact, atol=2e-6)
    np.testing.assert_array_equal(kernels.adopted(out), mean.astype(np.float32))
    np.testing.assert_array_equal(kernels.gradient_inside(flat), flat)


def cuts(layer: Snella) -> list[int]:
    return np.cumsum([p.numel() for p in own(layer).values()])[:-1].tolist()


def test_another_number_of_entries_leaves_the_model_as_it_is() -> None:
    sent = snella()
    kernels, flat = bound(sent)
    x = kernels.inside(flat)
    kernels.decided({"0.num_kept": np.array([20])})
    with torch.no_grad():
        for p, piece in zip(own(sent).values(), np.split(kernels.outside(x), cuts(sent)), strict=True):
            p.copy_(torch.from_numpy(piece).reshape(p.shape))
    sent.num_kept.fill_(20)
    np.testing.assert_allclose(sent.delta_weight().detach().numpy(), 0.0, atol=2e-6)


def test_no_step_moves_what_is_folded() -> None:
    layer = snella()
    before = layer.folded.clone()
    layer.start_training(1, (0,))
    with torch.no_grad():
        layer.folded.mul_(0.9)  # Weight decay of an optimizer of the flat vector.
    layer.leave_step()
    assert torch.equal(layer.folded, before)
    layer.end_training()
    assert not layer.folded.requires_grad


def test_what_it_does_not_go_with() -> None:
    layout = ParameterLayout.from_arrays({"w": as_array(np.zeros(3, np.float32))})
    with pytest.raises(ConfigError, match="'exact-fold' needs tensors 'folded'"):
        FoldedKernels(1.0).bind(layout, np.zeros(3, np.float32))
    with pytest.raises(ConfigError, match="exact-fold"):
        SnellaConfig(total_step=9, aggregation="exact-svd")  # type: ignore[arg-type]
    kernels, _ = bound(snella())
    with pytest.raises(CheckpointError, match="another aggregation"):
        kernels.load_state_dict({})
