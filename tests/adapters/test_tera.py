"""TeRA's invariants: a Tucker network, its Kronecker form, its rank, one mode at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from turnout.peft import TeraConfig, attach
from turnout.peft.tera import Tera
from turnout.wire import ConfigError

MODES = {"out_modes": (2, 3, 4), "in_modes": (3, 5)}
SIDES = (24, 15)


def tera(seed: int = 0, **options: object) -> Tera:
    (layer,) = attach(
        nn.Sequential(nn.Linear(SIDES[1], SIDES[0])),
        TeraConfig(**{**MODES, "seed": seed, **options}),  # type: ignore[arg-type]
    ).layers.values()
    assert isinstance(layer, Tera)
    return layer


def move(layer: Tera, seed: int = 1, modes: range | None = None) -> Tera:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n in range(len(layer.tera_d)) if modes is None else modes:
            layer.tera_d[n].copy_(torch.randn(layer.tera_d[n].shape, generator=generator))
    return layer


def mode_product(t: Tensor, matrix: Tensor, n: int) -> Tensor:
    return torch.tensordot(t, matrix, dims=([n], [1])).movedim(-1, n)


def test_it_starts_at_zero_with_one_way_to_go() -> None:
    layer = tera()
    assert not layer.delta_weight().any()
    layer(torch.randn(6, SIDES[1])).square().sum().backward()
    gradients = [d.grad for d in layer.tera_d]
    assert gradients[0] is not None
    assert gradients[0].any()
    assert all(g is not None and not g.any() for g in gradients[1:])


@pytest.mark.parametrize("ranks", [None, 2, (3, 2, 4, 2, 5)])
def test_the_network_is_the_kronecker_form_and_the_fast_forward(ranks: object) -> None:
    layer = move(tera(ranks=ranks))
    t = layer.tera_core
    for n, (factor, d) in enumerate(zip(layer.factors, layer.tera_d, strict=True)):
        t = mode_product(t, factor * d, n)
    torch.testing.assert_close(layer.delta_weight(), t.reshape(SIDES), atol=1e-5, rtol=1e-5)
    x = torch.randn(2, 5, SIDES[1])
    dense = nn.functional.linear(x, layer.weight + layer.delta_weight(), layer.bias)
    torch.testing.assert_close(layer(x), dense, atol=1e-4, rtol=1e-4)
    assert sum(d.numel() for d in layer.tera_d) == sum(layer.tera_core.shape)


def test_two_modes_are_vera() -> None:
    layer = move(tera(out_modes=(24,), in_modes=(15,), ranks=(24, 9)))
    a1, a2 = layer.factors
    d1, d2 = (torch.diag(d) for d in layer.tera_d)
    torch.testing.assert_close(
        layer.delta_weight(), a1 @ d1 @ layer.tera_core @ d2 @ a2.T, atol=1e-5, rtol=1e-5
    )


def test_the_rank_is_that_of_the_modes_not_of_what_is_trained() -> None:
    def rank(layer: Tera) -> int:
        return int(torch.linalg.matrix_rank(layer.double().delta_weight()))

    assert rank(move(tera())) == 15
    assert rank(move(tera(ranks=(2, 3, 4, 2, 2)))) == 4
    assert rank(move(tera(ranks=(1, 1, 1, 3, 5)))) == 1
    layer = move(tera())
    with torch.no_grad():
        layer.tera_d[4][:3] = 0  # Two of five are left, times three of the other mode.
    assert rank(layer) == 6


def test_scaling_one_diagonal_up_and_one_down_changes_nothing() -> None:
    layer = move(tera())
    before = layer.delta_weight()
    with torch.no_grad():
        layer.tera_d[0].mul_(4.0)
        layer.tera_d[3].div_(4.0)
    torch.testing.assert_close(layer.delta_weight(), before, atol=1e-5, rtol=1e-5)
    order = torch.tensor([2, 0, 1])  # And neither does a new numbering of a mode's ranks, everywhere.
    with torch.no_grad():
        layer.tera_d[1].copy_(layer.tera_d[1][order])
        layer.tera_factor_1 = layer.factors[1][:, order]
        layer.tera_core = layer.tera_core.index_select(1, order)
    torch.testing.assert_close(layer.delta_weight(), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", range(5))
def test_one_mode_at_a_time_has_an_exact_mean(mode: int) -> None:
    clients = [move(move(tera(), seed=1), seed=10 + k, modes=range(mode, mode + 1)) for k in range(3)]
    mean = move(tera(), seed=1)
    with torch.no_grad():
        mean.tera_d[mode].copy_(torch.stack([c.tera_d[mode] for c in clients]).mean(0))
    of_deltas = torch.stack([c.delta_weight() for c in clients]).mean(0)
    torch.testing.assert_close(mean.delta_weight(), of_deltas, atol=1e-5, rtol=1e-5)
    everything = [move(tera(), seed=20 + k) for k in range(3)]
    with torch.no_grad():
        for n in range(5):
            mean.tera_d[n].copy_(torch.stack([c.tera_d[n] for c in everything]).mean(0))
    of_deltas = torch.stack([c.delta_weight() for c in everything]).mean(0)
    assert (mean.delta_weight() - of_deltas).norm() > 0.1 * of_deltas.norm()


def test_rounds_train_the_modes_in_turn() -> None:
    layer = tera()
    rests = []
    for server_round in range(1, 7):
        layer.start_training(server_round, (0,))
        rests.append({id(d) for d in layer.resting()})
        layer.end_training()
        assert not layer.resting()
    everything = {id(d) for d in layer.tera_d}
    assert [everything - rest for rest in rests] == [{id(layer.tera_d[n % 5])} for n in range(6)]
    layer = tera(train_modes="all")
    layer.start_training(1, (0,))
    assert not layer.resting()


def test_layers_of_one_shape_share_one_network() -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    first, second, third = attach(module, TeraConfig()).layers.values()
    assert first.tera_core is second.tera_core is not third.tera_core
    assert "0.tera_core" not in module.state_dict()
    module = nn.Sequential(nn.Linear(16, 16))
    attach(module, TeraConfig(save_projection=True))
    assert "0.tera_core" in module.state_dict()


def test_seeds_make_the_network_and_checksums_tell() -> None:
    assert tera(seed=4).checksum == tera(seed=4).checksum != tera(seed=5).checksum
    with pytest.raises(ConfigError, match="checksum"):
        tera(seed=5).load_shared_state(tera(seed=4).shared_state())
    whole, other = tera(seed=4, save_projection=True), tera(seed=5, save_projection=True)
    other.load_shared_state(whole.shared_state())
    assert other.checksum == whole.checksum
    forged = {**whole.shared_state(), "tera_core": whole.tera_core + 1}
    with pytest.raises(ConfigError, match="checksum"):
        other.load_shared_state(forged)


@pytest.mark.parametrize(
    ("side", "modes"),
    [(64, (8, 8)), (768, (24, 32)), (31, (31,)), (37, (37,)), (4096, (16, 16, 16)), (1, (1,))],
)
def test_modes_by_default(side: int, modes: tuple[int, ...]) -> None:
    (layer,) = attach(nn.Sequential(nn.Linear(1, side)), TeraConfig(ranks=1)).layers.values()
    assert isinstance(layer, Tera)
    assert tuple(f.shape[0] for f in layer.factors[: layer.outputs]) == modes


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="multiply to 12"):
        tera(out_modes=(3, 4))
    with pytest.raises(ConfigError, match="one rank per mode"):
        tera(ranks=(1, 2))
