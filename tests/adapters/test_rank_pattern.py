"""AdaLoRA's pruned folders: those of the real ``peft`` are read, ours are read by it, with equal outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from turnout.peft import AdaLoraConfig, attach, load_adapter, save_adapter
from turnout.peft.adalora import AdaLora
from turnout.wire import DataError

peft = pytest.importorskip("peft")
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
SETTINGS: dict[str, Any] = {"init_r": 4, "target_r": 1, "tinit": 2, "tfinal": 5, "total_step": 20}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


def theirs(folder: Path) -> nn.Module:
    """Train the real thing until it has pruned, and save it."""
    config = peft.AdaLoraConfig(**SETTINGS, target_modules=["first", "second"])
    model = peft.get_peft_model(Net(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(1, 21):
        loss = (model(X) - Y).square().mean()
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(folder)
    trained: nn.Module = model.eval()
    return trained


def test_a_pruned_folder_of_peft_is_read(tmp_path: Path) -> None:
    model = theirs(tmp_path)
    adapted = load_adapter(Net(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(adapted.module(X), model(X), atol=1e-5, rtol=1e-5)
    layers = [layer for layer in adapted.layers.values() if isinstance(layer, AdaLora)]
    assert sum(int(layer.rank_mask.sum()) for layer in layers) == 2  # target_r of two layers.
    assert {layer.lora_A.shape[0] for layer in layers} == {4}


def pruned() -> Any:
    adapted = attach(Net(), AdaLoraConfig(**SETTINGS))
    generator = torch.Generator().manual_seed(5)
    for tensor in adapted.trainable_state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    for layer, kept in zip(adapted.layers.values(), ([1, 0, 1, 0], [0, 0, 0, 1]), strict=True):
        layer.rank_mask.copy_(torch.tensor(kept))  # type: ignore[operator,union-attr]
    return adapted


def test_peft_reads_what_we_pruned(tmp_path: Path) -> None:
    adapted = pruned()
    save_adapter(adapted, tmp_path)
    shapes = {
        name.split("model.", 1)[1]: tuple(t.shape)
        for name, t in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    assert shapes["model.first.lora_A"] == (2, 8)
    assert shapes["model.second.lora_B"] == (8, 1)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert {name: sum(mask) for name, mask in pattern.items()} == {"first.lora_E": 2, "second.lora_E": 1}
    model = peft.PeftModel.from_pretrained(Net(), tmp_path).eval()
    again = load_adapter(Net(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(X), adapted.module(X), atol=1e-5, rtol=1e-4)
        assert torch.equal(again.module(X), adapted.module(X))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"first.lora_E": [True]}, "init_r=4"),
        ({"first.lora_E": [1, 0, 1, 0]}, "truth values"),
        ({"first": [True] * 4}, "lora_E"),
        ([True], "truth values"),
        ({"first.lora_E": [True] * 4}, "another number"),
    ],
)
def test_patterns_that_do_not_fit(pattern: Any, message: str, tmp_path: Path) -> None:
    save_adapter(pruned(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": pattern}))
    with pytest.raises(DataError, match=message):
        load_adapter(Net(), tmp_path)
