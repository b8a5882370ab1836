"""What the docs say beside the code agrees with it: tables, error messages, formulas, docstrings."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from pages import DOCS, REPOSITORY, STRATEGY_PAGES

from experiment_tables import section_rows
from fields import as_sections, field_texts
from generated import fill
from mathml import with_mathml
from strategy_tables import strategy_rows
from turnout.experiment.model import FIXED
from turnout.wire import find

SOURCES = ("proto", "strategies", "client", "server")


@pytest.mark.parametrize("section", sorted(FIXED))
def test_every_key_of_a_section_is_explained(section: str) -> None:
    rows = section_rows(section)
    assert [row.name for row in rows] == list(FIXED[section].model_fields)
    assert all(row.meaning and row.kind for row in rows)


@pytest.mark.parametrize("page", STRATEGY_PAGES, ids=lambda page: page.stem)
def test_a_strategy_page_has_all_its_parts(page) -> None:
    text = page.read_text(encoding="utf-8")
    for heading in (
        "When to use it",
        "When not",
        "Update rule",
        "Options",
        "In an experiment file",
        "Measured",
    ):
        assert f"\n## {heading}\n" in text
    assert "$$" in text.split("## Update rule")[1].split("## Options")[0]
    paper = find("strategy", page.stem).paper
    assert f"https://arxiv.org/abs/{paper}" in fill(text)


def test_options_that_a_strategy_refuses_are_not_listed() -> None:
    names = {
        slug: {row.name for row in strategy_rows(slug)} for slug in ("feddyn", "fedau", "unbiased-fedavg")
    }
    assert {"server_lr", "client_weights"} & names["feddyn"] == set()
    assert {"server_lr", "client_weights"} <= names["fedau"]
    assert {"server_lr", "client_weights"} <= names["unbiased-fedavg"]


@cache
def messages() -> list[str]:
    """Every text of the program with `…` where a value goes."""
    found = []
    for root in SOURCES:
        for path in (REPOSITORY / root / "turnout").rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                found += [template(node)] if isinstance(node, (ast.Constant, ast.JoinedStr)) else []
    return [*found, (REPOSITORY / "Makefile").read_text(encoding="utf-8").replace("{v.major}.{v.minor}", "…")]


def template(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    assert isinstance(node, ast.Constant)
    return re.sub(r"%[.\d]*[srdf]", "…", node.value) if isinstance(node.value, str) else ""


def test_troubleshooting_quotes_real_messages() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [quote.strip() for quote in re.findall(r"^### `+(.*?)`+$", text, re.MULTILINE)]
    assert len(quoted) > 30
    unknown = [quote for quote in quoted if not any(quote in message for message in messages())]
    assert unknown == []


DOCSTRING = """Weights each update.

    ``cutoff``: K, the longest interval
    counted.

    beta
        Weight of the stale part.
    lr, momentum
        As in torch.
    """


def test_fields_of_docstrings_are_read() -> None:
    assert field_texts(DOCSTRING) == {
        "cutoff": "K, the longest interval counted.",
        "beta": "Weight of the stale part.",
        "lr": "As in torch.",
        "momentum": "As in torch.",
    }
    assert field_texts(None) == {}
    assert "Parameters\n----------\nbeta\n    Weight of the stale part.\n" in as_sections(
        DOCSTRING, "Parameters"
    )


def test_unknown_marks_and_formulas_are_errors() -> None:
    with pytest.raises(LookupError):
        fill("<!-- generated: nothing -->")
    with pytest.raises(LookupError):
        fill("<!-- generated: study nothing -->")
    with pytest.raises(ValueError, match="not understood"):
        with_mathml(r'<span class="arithmatex">\(\nosuchcommand x\)</span>')
    shown = with_mathml(r'<div class="arithmatex">\[\sum_{i=1}^N \Delta_i\]</div>')
    assert "<munderover><mo" in shown
    assert 'mathvariant="normal"' in shown
