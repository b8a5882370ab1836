"""The code in the docs runs: whole on pages that promise it, its imports everywhere."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest
from pages import DOCS, OPTIMIZER_PAGES, PAGES, STRATEGY_PAGES, blocks

from turnout.experiment import load_experiment
from turnout.simulation.run import simulate
from turnout.tasks.cache import cache_folder
from turnout.tasks.source_archives import SHAKESPEARE
from turnout.wire import methods, registry

RUNNABLE = [
    *STRATEGY_PAGES,
    *OPTIMIZER_PAGES,
    *(DOCS / f"{name}.md" for name in ("quickstart", "concepts", "simulation", "optimizers")),
]
if (cache_folder("archives") / SHAKESPEARE.file_name).is_file():  # turnout data fetch shakespeare-lm
    RUNNABLE.append(DOCS / "fine-tuning.md")
SMALL = ["run.rounds=2", "task.num_clients=6", "client.batch_size=16"]


def name(page: Path) -> str:
    return page.stem


def test_every_strategy_has_a_page() -> None:
    assert {page.stem for page in STRATEGY_PAGES} == {entry.slug for entry in methods("strategy")}


@pytest.mark.parametrize("page", STRATEGY_PAGES, ids=name)
def test_the_experiment_of_a_strategy_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [block] = blocks(page, "toml")
    Path("experiment.toml").write_text(block.text, encoding="utf-8")
    assert load_experiment("experiment.toml").strategy.name == page.stem
    summary = simulate(load_experiment("experiment.toml", SMALL), plots=False)
    assert summary.rounds == 2
    assert 0.0 <= summary.metrics["accuracy"] <= 1.0


def test_every_optimizer_is_on_a_page() -> None:
    texts = [page.read_text(encoding="utf-8") for page in OPTIMIZER_PAGES]
    named = {slug for text in texts for slug in re.findall(r"optimizer-paper ([\w-]+) -->", text)}
    assert named == {entry.slug for entry in methods("optimizer")}


@pytest.mark.parametrize("page", OPTIMIZER_PAGES, ids=name)
def test_the_experiment_of_an_optimizer_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [block] = blocks(page, "toml")
    Path("experiment.toml").write_text(block.text, encoding="utf-8")
    summary = simulate(load_experiment("experiment.toml", SMALL), plots=False)
    assert summary.rounds == 2


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_the_python_of_a_page_runs(page: Path) -> None:
    found = blocks(page, "python")
    assert found
    for block in found:
        short = re.sub(r"num_rounds=\d+", "num_rounds=2", block.text).replace("[100]", "[2]")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(short, block.place, "exec"), {"__name__": "__main__"})
        assert out.getvalue()


def test_the_concepts_page_shows_what_its_code_prints() -> None:
    page = DOCS / "concepts.md"
    [code], [shown] = blocks(page, "python"), blocks(page, "text")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code.text, code.place, "exec"), {})
    assert out.getvalue() == shown.text


def test_the_example_strategy_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))  # It registers itself.
    [block] = blocks(DOCS / "writing-a-strategy.md", "python")
    names: dict[str, type] = {}
    exec(compile(block.text, block.place, "exec"), names)
    from turnout.client import client_app
    from turnout.simulation import LocalGrid
    from turnout.tasks import Digits

    task = Digits(num_clients=4, model="softmax")
    grid = LocalGrid(client_app(task, local_steps=1), 4)
    result = names["ClippedMean"](clip=0.01).start(grid, task.initial_arrays(), num_rounds=1)
    before, after = task.initial_arrays(), result.arrays
    assert all(abs(after[key].numpy() - before[key].numpy()).max() <= 0.01 for key in before)


def test_imports_in_all_pages_work() -> None:
    count = 0
    for page in PAGES:
        for block in blocks(page, "python"):
            tree = ast.parse(block.text, block.place)
            tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
            exec(compile(tree, block.place, "exec"), {})
            count += len(tree.body)
    assert count > 60


def test_every_experiment_in_the_docs_is_valid(tmp_path: Path) -> None:
    """Blocks with a section are complete but for what other sections default to."""
    count = 0
    for page in PAGES:
        for block in blocks(page, "toml"):
            if 'name = "external"' in block.text:
                continue
            path = tmp_path / "experiment.toml"
            path.write_text(block.text, encoding="utf-8")
            try:
                load_experiment(path)
            except Exception as error:
                raise AssertionError(f"{block.place}: {error}") from error
            count += 1
    assert count > 15
