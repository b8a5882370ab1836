"""What is shown from files of the repository: figures that benchmarks wrote, and examples."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from turnout.wire import methods

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "docs" / "results"
_LANGUAGES = {".py": "python", ".toml": "toml"}
_CLAIMS = re.compile(r"^## (\S+)\n\n(.*?)\n\n(\| claim .*?)\n\n", re.MULTILINE | re.DOTALL)
_TABLE = re.compile(r"<!-- table:.*?-->\n(.*?)\n<!-- end of table -->", re.DOTALL)


def study(slug: str) -> str:
    """Return a paper's small study: the claims, ours beside the baselines', held or not."""
    text = (RESULTS / "reproductions.md").read_text(encoding="utf-8")
    found = {match[1]: match for match in _CLAIMS.finditer(text)}
    if slug not in found:
        importlib.import_module("turnout.reproduce")
        if slug not in {entry.slug for entry in methods("study")}:
            raise LookupError(f"there is no study {slug!r}; results/reproductions.md has {sorted(found)}")
        return (
            f"`turnout reproduce {slug}` runs the paper's idea on a problem small enough for a minute, and "
            "says of each claim whether it holds. Its figures are not among the "
            "[published ones](../results/reproductions.md) yet."
        )
    _, summary, claims = found[slug].groups()
    return (
        f"`turnout reproduce {slug}` runs the paper's idea on a problem small enough for a minute. "
        f"{summary} [All its tables](../results/reproductions.md#{slug}).\n\n"
        f'<div class="claims" markdown>\n\n{claims}\n\n</div>'
    )


def participation_rows(slug: str) -> str:
    """Return the strategy's row of the participation study, above that of FedAvg."""
    text = (RESULTS / "participation.md").read_text(encoding="utf-8")
    table = _TABLE.search(text)
    if table is None:
        raise LookupError("results/participation.md has no table between its marks")
    head, rule, *rows = table[1].splitlines()
    by_name = {row.split("|")[1].strip(): row for row in rows}
    wanted = [by_name[name] for name in dict.fromkeys((slug, "fedavg"))]
    return "\n".join([head, rule, *wanted])


def shown_file(name: str) -> str:
    """Return a file of the repository as a block of code."""
    file = REPOSITORY / name
    if not file.is_file():
        raise LookupError(f"{name} is no file of the repository")
    text = file.read_text(encoding="utf-8").rstrip()
    return f"```{_LANGUAGES[file.suffix]}\n{text}\n```"
