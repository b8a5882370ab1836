"""Folders of the real ``peft``: what it saves we read, what we save it reads, and outputs are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from turnout.peft import (
    AdaLoraConfig,
    AdapterConfig,
    BoneConfig,
    LoraConfig,
    MissConfig,
    attach,
    load_adapter,
    merged_module,
    save_adapter,
    save_merged,
)
from turnout.wire import ConfigError, DataError, LayoutError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOKENS = torch.tensor([[1, 5, 9, 2], [3, 3, 7, 0]])
LAYERS = ("query", "value", "intermediate.dense")


def bert(seed: int = 0) -> Any:
    """A transformer of 2 layers from a configuration; nothing is downloaded."""
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(config).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(TOKENS).logits
    return output


# Name, our configuration, theirs.
PAIRS: list[tuple[str, AdapterConfig, Any]] = [
    ("lora", LoraConfig(r=3, lora_alpha=6), peft.LoraConfig(r=3, lora_alpha=6)),
    ("rslora", LoraConfig(r=3, use_rslora=True), peft.LoraConfig(r=3, use_rslora=True)),
    (
        "dropout",
        LoraConfig(r=3, lora_dropout=0.2),
        peft.LoraConfig(r=3, lora_dropout=0.2),
    ),
    ("adalora", AdaLoraConfig(init_r=4, total_step=9), peft.AdaLoraConfig(init_r=4, total_step=9)),
    ("miss", MissConfig(r=5), peft.MissConfig(r=5)),
    (
        "mini",
        MissConfig(r=4, init_weights="mini", mini_r=8),
        peft.MissConfig(r=4, init_weights="mini", mini_r=8),
    ),
    ("bat", BoneConfig(r=8), peft.MissConfig(r=8, init_weights="bat")),
]
every_pair = pytest.mark.parametrize(("ours", "theirs"), [p[1:] for p in PAIRS], ids=[p[0] for p in PAIRS])


def shaken(tensors: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(4)
    for name in sorted(tensors):
        tensors[name].add_(0.3 * torch.randn(tensors[name].shape, generator=generator))


@every_pair
def test_peft_reads_what_we_save(ours: AdapterConfig, theirs: Any, tmp_path: Path) -> None:
    config = type(ours)(**{**vars(ours), "target_modules": LAYERS, "modules_to_save": ("classifier",)})
    adapted = attach(bert(), config)
    shaken(adapted.trainable_state_dict())
    save_adapter(adapted, tmp_path, base_model="tiny")
    model = peft.PeftModel.from_pretrained(bert(), tmp_path)
    assert type(model.peft_config["default"]) is type(theirs)
    torch.testing.assert_close(logits(model.eval()), logits(adapted.module), atol=1e-5, rtol=1e-5)
    assert (logits(adapted.module) - logits(bert())).abs().max() > 0.01
    merged = logits(model.merge_and_unload())
    torch.testing.assert_close(logits(merged_module(adapted)), merged, atol=1e-5, rtol=1e-5)


@every_pair
def test_we_read_what_peft_saves(ours: AdapterConfig, theirs: Any, tmp_path: Path) -> None:
    theirs = type(theirs)(
        **{**theirs.to_dict(), "target_modules": list(LAYERS), "modules_to_save": ["classifier"]}
    )
    model = peft.get_peft_model(bert(), theirs).eval()
    shaken({n: p.data for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n})
    model.save_pretrained(tmp_path)
    adapted = load_adapter(bert(), tmp_path)
    torch.testing.assert_close(logits(adapted.module), logits(model), atol=1e-5, rtol=1e-5)
    for field in ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_r", "init_weights", "mini_r"):
        if hasattr(ours, field):
            assert getattr(adapted.config, field) == getattr(ours, field)
    # And the way back: our folder of it is as good as theirs.
    again = load_adapter(bert(), save_adapter(adapted, tmp_path / "again"))
    assert torch.equal(logits(again.module), logits(adapted.module))


@every_pair
def test_defaults_are_those_of_peft(ours: AdapterConfig, theirs: Any) -> None:
    needed = {"total_step": 5} if isinstance(ours, AdaLoraConfig) else {}
    own, other = vars(type(ours)(**needed)), vars(type(theirs)(**needed))
    if isinstance(ours, BoneConfig):
        del own["init_weights"]  # The paper's method is another one than the default of its successor.
    shared = set(own) & set(other)
    assert shared >= {"target_modules", "exclude_modules", "modules_to_save"}
    assert {name: own[name] for name in shared} == {name: other[name] for name in shared}


def test_a_model_that_needs_no_adapters_any_more_is_loaded_by_transformers(tmp_path: Path) -> None:
    adapted = attach(bert(), LoraConfig(target_modules=LAYERS))
    shaken(adapted.trainable_state_dict())
    expected = logits(adapted.module)
    save_merged(adapted, tmp_path)
    read = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(read), expected, atol=1e-5, rtol=1e-5)


def gpt2() -> Any:
    """A transformer of one layer whose linear layers store their weights transposed."""
    config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


TRANSPOSED: list[tuple[AdapterConfig, Any]] = [
    (LoraConfig(r=3), peft.LoraConfig(r=3)),
    (AdaLoraConfig(init_r=3, total_step=9), peft.AdaLoraConfig(init_r=3, total_step=9)),
]


@pytest.mark.parametrize(("ours", "theirs"), TRANSPOSED, ids=["lora", "adalora"])
def test_transposed_layers_are_exchanged_too(ours: AdapterConfig, theirs: Any, tmp_path: Path) -> None:
    layers = ("c_attn", "c_fc")
    adapted = attach(gpt2(), type(ours)(**{**vars(ours), "target_modules": layers}))
    shaken(adapted.trainable_state_dict())
    save_adapter(adapted, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(read), logits(adapted.module), atol=1e-5, rtol=1e-5)
    expected = logits(read)
    torch.testing.assert_close(logits(merged_module(adapted)), expected, atol=1e-5, rtol=1e-5)

    options = {**theirs.to_dict(), "target_modules": list(layers), "fan_in_fan_out": True}
    model = peft.get_peft_model(gpt2(), type(theirs)(**options)).eval()
    shaken({n: p.data for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n})
    model.save_pretrained(tmp_path / "theirs")
    again = load_adapter(gpt2(), tmp_path / "theirs")
    torch.testing.assert_close(logits(again.module), logits(model), atol=1e-5, rtol=1e-5)


def test_folders_of_the_old_name_of_miss_are_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapted = attach(bert(), BoneConfig(r=8, target_modules=LAYERS))
    shaken(adapted.trainable_state_dict())
    save_adapter(adapted, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({n.replace("miss_", "bone_"): t for n, t in load_file(file).items()}, file)
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text.replace('"MISS"', '"BONE"'))
    assert torch.equal(logits(load_adapter(bert(), tmp_path).module), logits(adapted.module))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"use_dora": True}, ConfigError, "use_dora=True"),
        ({"init_lora_weights": "pissa"}, ConfigError, "init_lora_weights='pissa'"),
        ({"rank_pattern": {"query": 2}}, ConfigError, "rank_pattern"),
        ({"peft_type": "LOAR"}, ConfigError, "Did you mean 'LORA'"),
        ({"peft_type": None}, DataError, "peft_type is missing"),
        ({"r": "8"}, ConfigError, "r='8'"),
        ({"r": 5}, LayoutError, "shape"),
        ({"target_modules": ["key"]}, LayoutError, "does not fit the model"),
    ],
)
def test_folders_that_cannot_be_used(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    adapted = attach(bert(), LoraConfig(target_modules=LAYERS))
    save_adapter(adapted, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=message):
        load_adapter(bert(), tmp_path)


def test_pickles_and_broken_files_are_not_read(tmp_path: Path) -> None:
    save_adapter(attach(bert(), LoraConfig(target_modules=LAYERS)), tmp_path)
    model = tmp_path / "adapter_model.safetensors"
    model.write_bytes(model.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        load_adapter(bert(), tmp_path)
    model.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(DataError, match="never pickles"):
        load_adapter(bert(), tmp_path)
