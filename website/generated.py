"""Parts of pages that are written by the code they are about: ``<!-- generated: NAME ARGUMENTS -->``."""

from __future__ import annotations

import re
from collections.abc import Callable

from adapter_tables import adapter_paper, adapter_table, adapter_tables
from commands import commands
from experiment_tables import (
    client_table,
    link_table,
    participation_tables,
    partition_tables,
    probability_tables,
    section_table,
    task_tables,
)
from flower_tables import engine_table, stock_table
from optimizer_tables import optimizer_paper, optimizer_table, optimizer_tables
from published import participation_rows, shown_file, study
from strategy_tables import paper, strategy_table, strategy_tables

_MARK = re.compile(r"^<!-- generated: ([\w-]+)((?: [\w./-]+)*) -->$", re.MULTILINE)

PARTS: dict[str, Callable[..., str]] = {
    "adapter-options": adapter_table,
    "adapter-paper": adapter_paper,
    "adapters": adapter_tables,
    "client-options": client_table,
    "commands": commands,
    "file": shown_file,
    "flower-engines": engine_table,
    "flower-strategies": stock_table,
    "link-options": link_table,
    "optimizer-options": optimizer_table,
    "optimizer-paper": optimizer_paper,
    "optimizers": optimizer_tables,
    "paper": paper,
    "participation-models": participation_tables,
    "participation-study": participation_rows,
    "partitions": partition_tables,
    "probabilities": probability_tables,
    "section": section_table,
    "strategies": strategy_tables,
    "strategy-options": strategy_table,
    "study": study,
    "tasks": task_tables,
}


def fill(markdown: str) -> str:
    """Return the page with its marks replaced. Raises LookupError or ValueError for what does not exist."""
    return _MARK.sub(lambda mark: PARTS[mark[1]](*mark[2].split()), markdown)
