"""Members of a model evaluated many at a time: the outputs of models that are written one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from turnout.client import members
from turnout.client.flat_model import FlatModel
from turnout.client.members import Members
from turnout.optim.perturbed import Perturbed
from turnout.wire.replica import Search

X = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


def hooked() -> nn.Module:
    layer = nn.Linear(16, 3)
    layer.register_forward_hook(lambda module, inputs, output: output + 1.0)
    return nn.Sequential(nn.Flatten(), layer)


def members_of(module: nn.Module, x: Tensor = X, **options: Any) -> tuple[FlatModel, Search, Members | None]:
    model = FlatModel(module.eval())
    search = Search(**{"seed": 3, "sigma": 0.05, **options})
    return model, search, Members.of(model.module, search.source(model.layout), x)


KNOWN: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "one layer": (nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), {"noise": "rademacher"}),
    "perceptron": (nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 3)), {}),
    "rank 3, dropout": (
        nn.Sequential(
            nn.Flatten(), nn.Linear(16, 9), nn.GELU(), nn.Dropout(0.5), nn.Linear(9, 3, bias=False)
        ),
        {"rank": 3},
    ),
    "frozen vectors": (
        nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 5), nn.Linear(5, 3)),
        {"freeze_1d": True, "rank": 2, "noise": "rademacher"},
    ),
    "float64": (nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Linear(4, 3)).double(), {"rank": 2}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_outputs_are_those_of_models_written_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, options = KNOWN[name]
    model, search, found = members_of(module, **options)
    assert found is not None
    x, source = X.to(model.parameters.dtype), search.source(model.layout)
    draws = [source.draw(1, j) for j in range(5)]
    monkeypatch.setattr(members, "_CHUNK_NUMBERS", 2 * 2 * 6 * 16)  # Two pairs at a time, then one.
    chunks = list(found.outputs(x, draws, search.sigma))
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    outputs, before = torch.cat(chunks), model.vector()
    tensors = model.layout.tensors
    perturbed = Perturbed(
        source, [model.parameters[t.offset : t.offset + t.size].view(t.shape) for t in tensors]
    )
    assert (model.vector() == before).all()
    for pair, draw in enumerate(draws):
        for sign, scale in enumerate((search.sigma, -search.sigma)):
            perturbed.write(draw, scale)
            with torch.no_grad():
                assert torch.allclose(outputs[pair, sign], model.module(x), rtol=1e-5, atol=1e-6)


UNKNOWN: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "convolution": (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)), {}),
    "norm": (nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3)), {}),
    "subclass": (nn.Sequential(nn.Flatten(), Twice(16, 3)), {}),
    "hook": (hooked(), {}),
    "rows of images": (nn.Sequential(nn.Linear(4, 3), nn.Flatten()), {}),
    "full-rank noise": (nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), {"rank": 0}),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_models_are_not_guessed_at(name: str) -> None:
    module, options = UNKNOWN[name]
    assert members_of(module, **options)[2] is None
