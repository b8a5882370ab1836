"""``turnout export``: what a run learned, in the form of Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from turnout.peft import load_adapter, merged_module
from turnout.tasks import Digits

Turnout = Callable[..., Any]

PEFT = """
[peft]
name = "{name}"
{options}
target_modules = ["1"]
modules_to_save = ["3"]
"""


def simulated(folder: Path, turnout: Turnout, peft: str = "") -> dict[str, Any]:
    file = folder / "small.toml"
    file.write_text(file.read_text() + peft)
    ran = turnout(
        "simulate",
        "small.toml",
        "--json",
        "--quiet",
        "--set",
        "run.rounds=3",
        "--set",
        "simulation.executor=serial",
    )
    assert ran.exit_code == 0, ran.output
    summary: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return summary


def accuracy(model: torch.nn.Module) -> float:
    task = Digits(num_clients=8, partition="label-mix", min_examples=1)
    return task.evaluate_model(model, task.test_data())["accuracy"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lora", 'r = 4\naggregation = "exact-svd"'),
        ("lift", "r = 4\nfilter_rank = 4\nupdate_interval = 2"),
    ],
)
def test_adapter_and_merged_model_are_those_of_the_run(
    name: str, options: str, folder: Path, turnout: Turnout
) -> None:
    summary = simulated(folder, turnout, PEFT.format(name=name, options=options))
    for form in ("adapter", "merged"):
        done = turnout("export", summary["run_id"], f"--{form}", "--to", form, "--json", "--quiet")
        assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["files"] == ["model.safetensors"]
    task = Digits(num_clients=8, partition="label-mix", min_examples=1)
    adapted = load_adapter(task.seeded_model(task.seed), "adapter")
    assert accuracy(adapted.module) == pytest.approx(summary["metrics"]["accuracy"], abs=1e-9)
    plain = task.model()
    plain.load_state_dict(load_file("merged/model.safetensors"))
    x = task.test_data().x
    torch.testing.assert_close(plain(x), merged_module(adapted)(x), atol=1e-6, rtol=1e-6)


def test_a_run_without_adapters_has_a_model_only(folder: Path, turnout: Turnout) -> None:
    summary = simulated(folder, turnout)
    refused = turnout("export", "last", "--adapter")
    assert refused.exit_code == 2
    assert "--merged" in refused.output
    assert turnout("export", "last", "--to", "whole").exit_code == 0
    model = Digits(num_clients=8).model()
    model.load_state_dict(load_file("whole/model.safetensors"))
    assert accuracy(model) == pytest.approx(summary["metrics"]["accuracy"], abs=1e-9)
    assert turnout("export", "last", "--to", "whole").exit_code == 2  # Nothing is written over.
