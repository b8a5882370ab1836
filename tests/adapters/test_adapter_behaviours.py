"""What every adapter does, row by row."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from adapter_rows import ROWS, SIDES, Row, ids, one_layer, shake
from torch import nn

from turnout.client import FlatModel
from turnout.peft import attach, load_adapter, save_adapter
from turnout.tasks.travelling import copy_sharing_frozen, travelling
from turnout.wire import ConfigError, LayoutError, methods

every_row = pytest.mark.parametrize("row", ROWS, ids=ids)
X = torch.randn(5, 3, SIDES[1], generator=torch.Generator().manual_seed(9))


def test_every_registered_adapter_has_a_row() -> None:
    assert {entry.slug for entry in methods("adapter")} == {row.slug for row in ROWS}


@every_row
def test_it_starts_at_the_base(row: Row) -> None:
    adapted, base = one_layer(row)
    difference = (adapted.module(X) - base(X)).abs().max()
    assert (difference == 0) or (difference < row.near and not row.starts_at_base)


@every_row
def test_the_first_gradient_flows_and_the_second_reaches_everything(row: Row) -> None:
    adapted, _ = one_layer(row)
    named = dict(adapted.module.named_parameters())
    parameters = {name: p for name, p in named.items() if p.requires_grad}
    assert set(parameters) == set(adapted.trainable_state_dict())
    for step in (1, 2):
        for parameter in parameters.values():
            parameter.grad = None
        (adapted.module(X) - 1.0).square().mean().backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            dead = step == 1 and name.rpartition(".")[2] in row.dead
            assert bool(parameter.grad.any()) is not dead, f"{name} in step {step}"
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= 0.1 * parameter.grad  # type: ignore[operator]
    assert all(not p.requires_grad for name, p in named.items() if name not in parameters)


@every_row
def test_merged_and_unmerged(row: Row) -> None:
    adapted, base = one_layer(row)
    shake(adapted)
    (layer,) = adapted.layers.values()
    output = adapted.module(X)
    dense = nn.functional.linear(X, base.weight + layer.delta_weight(), layer.bias)
    torch.testing.assert_close(output, dense, atol=1e-5, rtol=1e-5)
    adapted.merge()
    torch.testing.assert_close(adapted.module(X), output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.weight, base.weight + layer.delta_weight(), atol=1e-6, rtol=1e-6)
    with pytest.raises(ConfigError, match="merged already"):
        adapted.merge()
    adapted.unmerge()
    assert torch.equal(layer.weight, base.weight)
    assert torch.equal(adapted.module(X), output)
    with pytest.raises(ConfigError, match="not merged"):
        adapted.unmerge()


@every_row
def test_a_layer_that_stores_its_weight_transposed(row: Row) -> None:
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    torch.manual_seed(0)
    base = conv1d(*SIDES)
    if not row.config.adapts_transposed:
        with pytest.raises(ConfigError, match="no layer to adapt"):
            attach(nn.Sequential(base), row.config)
        return
    weight = base.weight.detach().clone()
    adapted = attach(nn.Sequential(base), row.config)
    shake(adapted)
    (layer,) = adapted.layers.values()
    output = adapted.module(X)
    torch.testing.assert_close(
        output, X @ (weight + layer.delta_weight().T) + base.bias, atol=1e-5, rtol=1e-5
    )
    adapted.merge()
    torch.testing.assert_close(base(X), output, atol=1e-5, rtol=1e-5)
    adapted.unmerge()
    assert torch.equal(base.weight, weight)


@every_row
def test_what_travels_is_what_the_formula_says(row: Row) -> None:
    adapted, _ = one_layer(row)
    state = adapted.trainable_state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == row.count(*SIDES)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    model = FlatModel(adapted.module)
    beside = adapted.allocation_state()
    held = {name: tensor for name, tensor in beside.items() if isinstance(tensor, nn.Parameter)}
    assert model.size == row.count(*SIDES) + sum(tensor.numel() for tensor in held.values())
    assert set(model.buffers) == set(beside) - set(held)


@every_row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_base_keeps_small_changes(row: Row, dtype: torch.dtype) -> None:
    adapted, _ = one_layer(row, dtype=dtype)
    shake(adapted, scale=0.05)
    (layer,) = adapted.layers.values()
    x = X.to(dtype)
    output = adapted.module(x)
    assert output.dtype == dtype
    assert {t.dtype for t in adapted.trainable_state_dict().values()} == {torch.float32}
    exact = nn.functional.linear(
        x.float(), layer.base_weight.float() + layer.delta_weight(), layer.bias.float()
    )  # type: ignore[union-attr]
    torch.testing.assert_close(output.float(), exact, atol=0.06, rtol=0.03)
    output.float().square().mean().backward()


@every_row
def test_the_same_seed_and_name_give_the_same_adapter_whatever_else_happens(row: Row) -> None:
    first, _ = one_layer(row)
    torch.rand(7)
    second, _ = one_layer(row)
    for name, tensor in first.trainable_state_dict().items():
        assert torch.equal(tensor, second.trainable_state_dict()[name])
    assert first.shared_state().keys() == second.shared_state().keys()
    assert all(torch.equal(t, second.shared_state()[name]) for name, t in first.shared_state().items())


@every_row
def test_a_copy_shares_the_frozen_tensors_only(row: Row) -> None:
    adapted, base = one_layer(row)
    twin = copy_sharing_frozen(adapted.module)
    travels = {t.data_ptr() for t in travelling(adapted.module).values()}
    ours = adapted.module.state_dict(keep_vars=True)
    for name, tensor in twin.state_dict(keep_vars=True).items():
        assert (tensor is ours[name]) is (ours[name].data_ptr() not in travels), name
    other = type(adapted).of(twin)
    shake(other)
    other.merge()
    assert torch.equal(adapted.module(X), base(X)) or not row.starts_at_base
    other.unmerge()
    assert not torch.equal(twin(X), adapted.module(X))


@every_row
def test_trained_tensors_are_taken_over_whole_or_not_at_all(row: Row) -> None:
    adapted, _ = one_layer(row)
    state = shake(adapted)
    other, _ = one_layer(row)
    other.load_trainable_state_dict(state)
    assert torch.equal(other.module(X), adapted.module(X))
    name = next(iter(state))
    with pytest.raises(LayoutError, match="missing"):
        other.load_trainable_state_dict({f"{name}x": state[name]})
    with pytest.raises(LayoutError, match="shape"):
        other.load_trainable_state_dict({**state, name: torch.zeros(1, 1, 1, 1)})


@every_row
def test_shared_state_travels_to_an_adapter_of_another_seed(row: Row) -> None:
    adapted, _ = one_layer(row)
    other, _ = one_layer(Row(row.slug, {**row.options, "seed": 77}, row.count, row.exact))
    shared = adapted.shared_state()
    other.load_shared_state(shared)
    other.load_trainable_state_dict(adapted.trainable_state_dict())
    other.load_allocation_state(adapted.allocation_state())
    assert torch.equal(other.module(X), adapted.module(X))
    with pytest.raises(ConfigError, match="shared state"):
        other.load_shared_state({**shared, "0.unknown": torch.zeros(1)})
    for name, tensor in shared.items():
        if not len(tensor):
            continue
        with pytest.raises(ConfigError):
            other.load_shared_state({**shared, name: (tensor.float()[:1] + 0.5)[None]})
        if not tensor.is_floating_point():
            bad = copy.deepcopy(tensor)
            bad[-1] = min(10**6, torch.iinfo(bad.dtype).max)
            with pytest.raises(ConfigError):
                other.load_shared_state({**shared, name: bad})


@every_row
def test_the_mean_of_what_travels_is_the_mean_of_dense_updates_where_it_is_said_to_be(row: Row) -> None:
    deltas, states, weights = [], [], (0.5, 0.3, 0.2)
    for client in range(3):
        adapted, _ = one_layer(row)
        states.append(shake(adapted, seed=client, scale=0.5))
        deltas.append(next(iter(adapted.delta_weights().values())))
    mean = {name: sum(w * s[name] for w, s in zip(weights, states, strict=True)) for name in states[0]}
    adapted, _ = one_layer(row)
    adapted.load_trainable_state_dict(mean)  # type: ignore[arg-type]
    (of_mean,) = adapted.delta_weights().values()
    error = float(
        (of_mean - sum(w * d for w, d in zip(weights, deltas, strict=True))).norm() / of_mean.norm()
    )
    assert (row.config.aggregation == "exact") is row.exact
    assert error < 1e-6 if row.exact else error > 1e-3


@every_row
def test_a_saved_folder_makes_the_same_layer_again(row: Row, tmp_path: Path) -> None:
    adapted, base = one_layer(row)
    shake(adapted)
    save_adapter(adapted, tmp_path)
    again = load_adapter(nn.Sequential(base), tmp_path)
    assert type(again.config) is type(adapted.config)
    assert torch.equal(again.module(X), adapted.module(X))


def test_modules_to_save_train_whole_beside_the_adapter() -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).to(torch.bfloat16)
    adapted = attach(module, ROWS[0].config.__class__(r=2, modules_to_save=("2",)))
    assert set(adapted.trainable_state_dict()) == {"0.lora_A", "0.lora_B", "2.weight", "2.bias"}
    module.train()
    before = module[1].running_mean.clone()  # type: ignore[operator,union-attr]
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    output = module(x)
    assert output.dtype == torch.float32
    assert torch.equal(module[1].running_mean, before)  # type: ignore[arg-type]
    module.eval()
    assert torch.equal(module(x), output)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, {"a.up", "a.down", "b.up", "b.down", "head"}),
        ({"target_modules": ("down",)}, {"a.down", "b.down"}),
        ({"target_modules": ("a.down", "head")}, {"a.down", "head"}),
        ({"target_modules": r"a\.(up|down)"}, {"a.up", "a.down"}),
        (
            {"target_modules": "all-linear", "exclude_modules": ("head",)},
            {"a.up", "a.down", "b.up", "b.down"},
        ),
        ({"modules_to_save": ("head",)}, {"a.up", "a.down", "b.up", "b.down"}),
    ],
)
def test_layers_are_chosen_as_in_peft(options: dict[str, object], chosen: set[str]) -> None:
    def block() -> nn.ModuleDict:
        return nn.ModuleDict({"up": nn.Linear(4, 8), "act": nn.ReLU(), "down": nn.Linear(8, 4)})

    module = nn.ModuleDict({"a": block(), "b": block(), "head": nn.Linear(4, 2)})
    adapted = attach(module, ROWS[0].config.__class__(r=2, **options))  # type: ignore[arg-type]
    assert set(adapted.layers) == chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ("donw",)}, "Did you mean 'down'"),
        ({"target_modules": ("act",)}, "a ReLU"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"target_modules": ("down",), "exclude_modules": r".*"}, "leave no layer"),
        ({"modules_to_save": ("haed",)}, "Did you mean 'head'"),
        ({"modules_to_save": "head"}, "give a list"),
    ],
)
def test_impossible_choices_of_layers(options: dict[str, object], message: str) -> None:
    module = nn.ModuleDict({"down": nn.Linear(4, 4), "act": nn.ReLU(), "head": nn.Linear(4, 2)})
    with pytest.raises(ConfigError, match=message):
        attach(module, ROWS[0].config.__class__(**options))  # type: ignore[arg-type]
    attach(module, ROWS[0].config)
    with pytest.raises(ConfigError, match="adapters already"):
        attach(module, ROWS[0].config)


def test_torchs_own_transformer_uses_the_adapters_in_evaluation_too() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    with pytest.raises(ConfigError, match="never calls"):
        attach(layer, ROWS[0].config.__class__(target_modules=("out_proj",)))
    adapted = attach(layer, ROWS[0].config)
    assert set(adapted.layers) == {"linear1", "linear2"}
    shake(adapted, scale=0.5)
    x = torch.randn(2, 3, 16)
    trained = layer(x)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), trained)
