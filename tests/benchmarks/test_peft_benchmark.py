"""The adapters' benchmark: its methods fit the encoder's layers, its table shows what was measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from turnout.wire import find, methods

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "peft.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peft_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def row(method: str, accuracy: float, **more: Any) -> dict[str, Any]:
    figures = dict.fromkeys(("up", "down", "seconds", "peak_mb", "saved_mb"), 1234.0)
    domains = {f"accuracy_{name}": accuracy for name in ("tweets", "amazon", "movies", "nyt")}
    return {
        "method": method, "seed": 0, "parameters": 74_498, "accuracy": accuracy, "aggregation": "exact",
        "lr": 2e-3, "grid_edge": False, **figures, **domains, **more,
    }  # fmt: skip


def test_every_adapter_has_settings_that_are_valid(benchmark: ModuleType) -> None:
    known = benchmark.every_method()
    assert {entry.slug for entry in methods("adapter")} <= set(known)
    for method in known.values():
        if method.peft is not None:
            options = {key: value for key, value in method.peft.items() if key != "name"}
            find("adapter", method.peft["name"]).target(**options)
        assert len(method.grid) >= 3
        assert list(method.grid) == sorted(method.grid)


def test_the_table_is_of_the_last_figures_and_ordered(benchmark: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    rows = [row("head", 0.80), row("lora", 0.5), row("lora", 0.83, grid_edge=True), row("paca", 0.82, seed=1)]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    found = benchmark.finished(path)
    assert set(found) == {("head", 0), ("lora", 0), ("paca", 1)}
    lines = benchmark.table(one for (_, seed), one in found.items() if seed == 0).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["`lora`", "`head`"]
    assert "| 83.0 | +3.0 |" in lines[2]
    assert "0.002 (edge)" in lines[2]
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
