"""Every simulator benchmark runs and prints what it promises, without peers; how fast is no matter here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(name: str, *arguments: object, timeout: float = 170) -> list[dict[str, Any]]:
    """Return the JSON lines that the benchmark prints."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["benchmark"] for row in rows} == {name.replace("_", "-")}
    return rows


def is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def test_all_systems_end_with_the_same_model(tmp_path: Path) -> None:
    table, lines = tmp_path / "page.md", tmp_path / "results.jsonl"
    table.write_text("# A page\n\nBefore.\n")
    rows = run("simulators", "--quick", "--executors", "threads", "--peers", "none", "--markdown", table,
               "--jsonl", lines)  # fmt: skip
    assert [row["system"] for row in rows] == [
        "turnout threads", "textbook loop", "tight loop, autograd", "tight loop, by-hand"
    ]  # fmt: skip
    for row in rows:
        assert is_positive(row["updates_per_s"]), row
        assert is_positive(row["of_limit"]), row
        assert row["of_best_peer"] is None
        assert row["agrees"], row
        assert row["distance"] < 1e-4, row
    # The same model everywhere, and one that has moved: nobody skipped the work.
    assert len({round(row["loss"], 3) for row in rows}) == 1
    assert "| turnout threads |" in table.read_text()
    assert table.read_text().startswith("# A page\n\nBefore.\n")
    assert len(lines.read_text().splitlines()) == len(rows)


def test_a_run_keeps_what_others_measured(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from simulators_report import Results, write_markdown

    page, lines = tmp_path / "page.md", tmp_path / "results.jsonl"
    page.write_text("# A page\n\nBefore.\n")
    write_markdown(page, "s one", "script", "old")
    page.write_text(f"{page.read_text()}\nAfter.\n")
    write_markdown(page, "s two", "script", "two")
    write_markdown(page, "s one", "script", "new")
    write_markdown(page, "t", "other", "three")
    words = [line for line in page.read_text().splitlines() if line and line[0] not in "`<"]
    assert words == ["# A page", "Before.", "new", "two", "After.", "three"]
    for benchmark, model, value in [("b", "m", 1), ("b", "n", 2), ("c", "m", 3), ("b", "m", 4)]:
        results = Results(benchmark, lines)
        results.add([{"model": model, "value": value}])
        results.save()
    assert [json.loads(line)["value"] for line in lines.read_text().splitlines()] == [2, 3, 4]


def test_a_setting_that_was_fastest_is_kept(monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from simulators_measure import Measured, System, chosen, narrowed

    every = [System("a", "peer", print, "1"), System("a", "peer", print, "2"), System("b", "loop", print)]
    settings = chosen([Measured(every[1], 1.0, [])])  # type: ignore[arg-type]
    assert narrowed(every, settings) == every[1:]
    assert narrowed(every, {}) == every


def test_the_line_through_cohort_sizes(monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from simulators_measure import fixed_costs

    one = {"model": "mlp", "system": "turnout serial", "clients": 100}
    rows = [
        {**one, "cohort": 10, "seconds_per_round": 0.03},
        {**one, "cohort": 100, "seconds_per_round": 0.21},
    ]
    (line,) = fixed_costs([*rows, {**one, "model": "cnn", "cohort": 10, "seconds_per_round": 1.0}])
    assert math.isclose(line["fixed_ms_per_round"], 10.0, rel_tol=1e-6)
    assert math.isclose(line["ms_per_client"], 2.0, rel_tol=1e-6)


def test_clients_that_do_nothing() -> None:
    rows = run("simulators_light", "--quick", "--executors", "serial", "--peers", "none")
    assert [row["system"] for row in rows] == ["turnout serial"]
    assert is_positive(rows[0]["ms_per_round"])
    assert rows[0]["times_turnout"] == 1.0


def test_scaling(tmp_path: Path) -> None:
    rows = run("simulator_scaling", "--quick", "--out", tmp_path)
    curve = [row for row in rows if row.get("part") == "100 per round"]
    assert [row["clients"] for row in curve] == [20, 500]
    for row in curve:
        assert is_positive(row["median_ms"]), row
        assert is_positive(row["peak_mb"]), row
    large = [row for row in rows if row.get("part") == "memory in a file"]
    assert [row["strategy"] for row in large] == ["fedstale"]
    for row in large:
        assert is_positive(row["limit_ms"]), row
        assert row["stored_gb"] > 0
    assert is_positive(rows[-1]["median_growth"])
    assert (tmp_path / "simulator-scaling.svg").exists()


def test_the_gpu_script_on_the_cpu() -> None:
    options = ("--quick", "--device", "cpu", "--models", "lenet", "--executors", "serial", "--no-peers")
    rows = run("simulators_gpu", *options)
    lenet = [row for row in rows if row["model"] == "lenet"]
    assert [row["system"] for row in lenet] == [
        "turnout serial", "tight loop, one by one", "tight loop, batched"
    ]  # fmt: skip
    for row in rows:
        assert row["agrees"], row
        assert row["gpu_percent"] is None


def test_a_system_that_skips_work_is_found(monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from simulators_measure import Measured, System, figures
    from simulators_work import Federation, Workload

    work = Workload(model="softmax", clients=4, cohort=2, examples=20)
    start = Federation(work).initial().numpy()
    moved = start + 0.1
    rows = [
        Measured(System("textbook loop", "loop", print), 1.0, moved, [1.0]),
        Measured(System("honest", "peer", print), 2.0, moved + 1e-7, [2.0]),
        Measured(System("lazy", "turnout", print), 0.1, start + 0.05, [0.1]),
    ]
    agrees = {row["system"]: row["agrees"] for row in figures(work, rows)}
    assert agrees == {"textbook loop": True, "honest": True, "lazy": False}


def test_the_encoder_shares_only_adapters_and_head(monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import torch

    import simulators_minilm

    shapes = {"query": (384, 384), "key": (384, 384), "value": (384, 384)}
    base: dict[str, torch.Tensor] = {
        "embeddings.word_embeddings.weight": torch.randn(50, 384),
        "embeddings.position_embeddings.weight": torch.randn(64, 384),
        "embeddings.token_type_embeddings.weight": torch.randn(2, 384),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        base[f"{name}.weight"], base[f"{name}.bias"] = torch.randn(rows, columns) / 20, torch.zeros(rows)

    for layer in range(6):
        place = f"encoder.layer.{layer}"
        for name, (rows, columns) in shapes.items():
            linear(f"{place}.attention.self.{name}", rows, columns)
        linear(f"{place}.attention.output.dense", 384, 384)
        linear(f"{place}.intermediate.dense", 1536, 384)
        linear(f"{place}.output.dense", 384, 1536)
        for name in ("attention.output", "output"):
            base[f"{place}.{name}.LayerNorm.weight"] = torch.ones(384)
            base[f"{place}.{name}.LayerNorm.bias"] = torch.zeros(384)
    base["embeddings.LayerNorm.weight"], base["embeddings.LayerNorm.bias"] = torch.ones(384), torch.zeros(384)
    monkeypatch.setattr(simulators_minilm, "frozen", lambda device: base)

    model = simulators_minilm.MiniLM()
    assert set(model.state_dict()) == {"lora_a", "lora_b", "head.weight", "head.bias"}
    ids = torch.randint(1, 50, (3, 12))
    padded = torch.cat([ids, torch.zeros(3, 5, dtype=torch.long)], 1)
    with torch.no_grad():
        torch.testing.assert_close(model.embed(padded), model.embed(ids), rtol=1e-3, atol=1e-4)
        before = model.embed(ids)
        model.lora_b.normal_()
        assert not torch.allclose(model.embed(ids), before)
