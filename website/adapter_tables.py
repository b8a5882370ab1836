"""Adapters: their options, their papers, and what is the same for all of them."""

from __future__ import annotations

from dataclasses import fields

from option_rows import Row, option_rows, table
from turnout.experiment.methods import load_methods
from turnout.peft import AdapterConfig
from turnout.wire import find, methods

_COMMON = ("target_modules", "exclude_modules", "modules_to_save", "base_dtype", "seed")


def adapter_table(slug: str) -> str:
    """Return the options of one adapter, its own before those that all have."""
    return table(adapter_rows(slug))


def adapter_rows(slug: str) -> list[Row]:
    """Return the options that the adapter takes."""
    load_methods()
    rows = option_rows(find("adapter", slug).target)
    return sorted(rows, key=lambda row: row.name in _COMMON)


def adapter_tables(there: str = "peft/") -> str:
    """Return every adapter with its summary and how the mean of what travels relates to the dense mean."""
    load_methods()
    lines = ["| name | what it is | averaging | in HF `peft` |", "| --- | --- | --- | --- |"]
    from turnout.peft.hub_formats import format_of_class

    for entry in methods("adapter"):
        config: type[AdapterConfig] = entry.target
        form = format_of_class(config)
        theirs = f"`{form.peft_type}`" if form.in_peft else "–"
        summary = entry.summary.replace("|", "\\|")
        own = {field.name for field in fields(config)}
        averaging: object = config.aggregation
        if isinstance(averaging, property) or "aggregation" in own:
            # With the options' defaults, where none has to be given.
            averaging = averaging if "total_step" in own else config().aggregation
            averaging = f"{averaging}, by option"
        lines.append(f"| [`{entry.slug}`]({there}{entry.slug}.md) | {summary} | {averaging} | {theirs} |")
    return "\n".join(lines)


def adapter_paper(slug: str) -> str:
    """Return where the adapter was published, as registered."""
    load_methods()
    entry = find("adapter", slug)
    if entry.paper is None:
        raise ValueError(f"adapter {slug!r} is registered without a paper")
    module, _, name = entry.class_path.rpartition(".")
    return (
        f"`{slug}` in an experiment file · `turnout.peft.{name}` in Python · "
        f"[arXiv {entry.paper}](https://arxiv.org/abs/{entry.paper}) · "
        f"source `client/{module.replace('.', '/')}.py`"
    )
