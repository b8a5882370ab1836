"""Optimizers: their options, their papers."""

from __future__ import annotations

from option_rows import option_rows, table
from turnout.experiment.methods import load_methods
from turnout.wire import find, methods

# Options that an experiment file sets elsewhere, or cannot write.
_ELSEWHERE = ("params", "lr", "generator", "foreach")
_PAGES = {"hybrid-auon": "auon", "eco-sgd": "eco", "eco-adamw": "eco"}


def optimizer_table(slug: str) -> str:
    """Return the options of one optimizer, as ``optimizer_options`` takes them."""
    load_methods()
    return table(option_rows(find("optimizer", slug).target, hidden=_ELSEWHERE))


def optimizer_tables() -> str:
    """Return links to every optimizer's page, with its one-line summary."""
    load_methods()
    lines = ["| name | what it is |", "| --- | --- |"]
    for entry in methods("optimizer"):
        page = _PAGES.get(entry.slug, entry.slug)
        lines.append(f"| [`{entry.slug}`](optimizers/{page}.md) | {entry.summary} |")
    return "\n".join(lines)


def optimizer_paper(slug: str) -> str:
    """Return where the optimizer was published, as registered."""
    load_methods()
    entry = find("optimizer", slug)
    module, name = entry.class_path.rsplit(".", 1)
    return (
        f"`{slug}` in an experiment file · `turnout.optim.{name}` in Python · "
        f"[arXiv {entry.paper}](https://arxiv.org/abs/{entry.paper}) · source "
        f"`client/{module.replace('.', '/')}.py`"
    )
