"""Every adapter has a page with all its parts, whose experiment and code run."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
from pages import DOCS, blocks

from generated import fill
from turnout.experiment import load_experiment
from turnout.simulation.run import simulate
from turnout.wire import find, methods

PAGES = sorted((DOCS / "peft").glob("*.md"))
SMALL = ["run.rounds=2", "task.num_clients=3", "client.batch_size=16", "client.local_steps=2"]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def test_every_adapter_has_a_page() -> None:
    assert {page.stem for page in PAGES} == {entry.slug for entry in methods("adapter")}


@every_page
def test_a_page_has_all_its_parts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for heading in ("When to use it", "When not", "Update", "Options", "In an experiment file", "Measured"):
        assert f"\n## {heading}\n" in text, heading
    assert "$$" in text.split("## Update")[1].split("## Options")[0]
    assert f"https://arxiv.org/abs/{find('adapter', page.stem).paper}" in fill(text)


@every_page
def test_the_experiment_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [block] = blocks(page, "toml")
    Path("experiment.toml").write_text(block.text, encoding="utf-8")
    experiment = load_experiment("experiment.toml", [*SMALL, "simulation.executor=serial"])
    assert experiment.peft is not None
    assert experiment.peft.name == page.stem
    assert simulate(experiment, plots=False).rounds == 2


@pytest.mark.parametrize("page", [DOCS / "peft.md", *PAGES], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page: Path) -> None:
    found = blocks(page, "python")
    assert found
    for block in found:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})
        assert out.getvalue()
