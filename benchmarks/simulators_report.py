"""What the simulator benchmarks print: tables for the eye, JSON lines, and Markdown for the documentation."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fleet_parties import rounded
from simulators_turns import cores

BEGIN, END = "<!-- {}: written by benchmarks/{}.py --markdown -->", "<!-- end of {} -->"
Columns = Sequence[tuple[str, str]]


def conditions() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")),
        platform.processor(),
    )  # fmt: skip
    return {
        "cores": cores(),
        "load": os.getloadavg()[0],  # Before the benchmark's own.
        "cpu": model,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def cell(value: Any) -> str:
    """Return a figure as it is read best."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        if abs(value) >= 100:
            return f"{value:,.0f}"
        return f"{value:.3g}" if abs(value) < 1 or abs(value) >= 10 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def show(title: str, columns: Columns, rows: Iterable[dict[str, Any]]) -> None:
    """Print a table on standard error; standard output is for JSON."""
    table = Table(title=title, title_justify="left")
    for position, (_, heading) in enumerate(columns):
        table.add_column(heading, justify="right" if position else "left", no_wrap=not position)
    for row in rows:
        bold = "bold" if str(row.get("kind")) == "turnout" else ""
        table.add_row(*(cell(row.get(name)) for name, _ in columns), style=bold)
    Console(stderr=True, width=None if Console(stderr=True).is_terminal else 130).print(table)


def markdown_table(columns: Columns, rows: Iterable[dict[str, Any]]) -> str:
    """Return a Markdown table."""
    lines = [
        " | ".join(heading for _, heading in columns),
        " | ".join(["---"] + ["---:"] * (len(columns) - 1)),
    ]
    lines += [" | ".join(cell(row.get(name)) for name, _ in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def write_markdown(path: Path, section: str, script: str, text: str) -> None:
    """Put this command and ``text`` between the marks of ``section`` in ``path``.

    A section that is not there yet goes behind the last one of this script, or else at the end.
    """
    begin, end = BEGIN.format(section, script), END.format(section)
    page = path.read_text() if path.exists() else ""
    if begin not in page:
        known = re.findall(re.escape(BEGIN).replace(r"\{\}", "{}").format("(.+)", script), page)
        last = END.format(known[-1]) if known else ""
        before, mark, after = page.partition(last) if last else (page.rstrip(), "", "\n")
        page = f"{before}{mark}\n\n{begin}\n{end}{after}".lstrip()
    before, rest = page.split(begin)
    command = shlex.join(["python", f"benchmarks/{script}.py", *_telling(sys.argv[1:])])
    path.write_text(f"{before}{begin}\n`{command}`\n\n{text}\n{end}{rest.split(end, 1)[1]}")


def _telling(words: Sequence[str]) -> list[str]:
    """Return the options that change what is measured."""
    silent = ("--markdown", "--jsonl")
    return [
        word for before, word in zip(["", *words], words, strict=False)
        if word not in silent and before not in silent
    ]  # fmt: skip


class Results:
    """JSON lines of one benchmark: printed as they come, and at the end put into ``file``, if any."""

    def __init__(self, benchmark: str, file: Path | None) -> None:
        self._benchmark, self._file = benchmark, file
        self._about = conditions()
        self._lines: list[str] = []

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Print ``rows`` with the conditions they were measured under."""
        for row in rows:
            line = json.dumps({"benchmark": self._benchmark, **rounded(row), **self._about})
            print(line, flush=True)
            self._lines.append(line)

    def save(self) -> None:
        """Let the file hold these lines instead of this benchmark's earlier ones about the same models."""
        if self._file is None:
            return
        mine = {_about(line) for line in self._lines}
        old = self._file.read_text().splitlines() if self._file.exists() else []
        kept = [line for line in old if _about(line) not in mine]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text("\n".join([*kept, *self._lines]) + "\n")


def _about(line: str) -> tuple[str, str | None]:
    row = json.loads(line)
    return row["benchmark"], row.get("model")
