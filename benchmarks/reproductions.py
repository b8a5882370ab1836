"""Run the papers' studies and write what the docs show: every claim with its figures, held or not.

    python benchmarks/reproductions.py [SLUG ...] [--publish]

The same studies as ``turnout reproduce SLUG``; about a minute each on two cores. ``--publish`` writes
``docs/results/reproductions.md``; with slugs, only these studies are run, and their parts of it replaced.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import turnout.reproduce  # noqa: F401 - fills the register
from turnout.reproduce.report import StudyReport
from turnout.wire import find, methods

DOCS = Path(__file__).resolve().parent.parent / "docs" / "results"
HEAD = """# The papers' small studies

Written by `python benchmarks/reproductions.py --publish`. Each study is what `turnout reproduce SLUG` runs:
Turnout's own classes on a problem small enough for a minute, with the strong baselines beside them.
"Reference" columns are an independent implementation's figures for the same problem. A claim that does not
hold is listed like the others: it says where the method is not the best choice.
"""


def markdown(report: StudyReport, paper: str | None) -> str:
    """Return one study as Markdown."""
    held = sum(claim.holds for claim in report.claims)
    lines = [f"## {report.slug}", ""]
    lines += [f"arXiv {paper}. {held} of {len(report.claims)} claims hold; {report.seconds:.0f} s.", ""]
    lines += ["| claim | measured | baseline | holds |", "| --- | --- | --- | --- |"]
    for claim in report.claims:
        measured, baseline = (_figure(value) for value in (claim.measured, claim.baseline))
        lines.append(f"| {claim.claim} | {measured} | {baseline} | {'yes' if claim.holds else '**no**'} |")
    for table in report.tables:
        lines += ["", f"### {table.title}", "", f"| {' | '.join(table.columns)} |"]
        lines.append("|" + " --- |" * len(table.columns))
        lines += [f"| {' | '.join(map(str, row))} |" for row in table.rows]
    return "\n".join(lines) + "\n"


def _figure(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def published() -> dict[str, str]:
    """Return the studies that the page has, by slug."""
    page = (DOCS / "reproductions.md").read_text(encoding="utf-8")
    return {match[1]: match[0] for match in re.finditer(r"^## (\S+)\n.*?(?=^## |\Z)", page, re.M | re.S)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--publish", action="store_true", help="write docs/results/reproductions.md")
    parser.add_argument("slugs", nargs="*", help="studies to run; all when left out")
    options = parser.parse_args()
    chosen = [find("study", slug) for slug in options.slugs] or methods("study")
    parts: dict[str, str] = {}
    for entry in chosen:
        report: StudyReport = entry.target()
        parts[entry.slug] = markdown(report, entry.paper)
        print(parts[entry.slug], flush=True)
    if options.publish:
        parts = (published() if options.slugs else {}) | parts
        ordered = [parts[slug].rstrip() + "\n" for slug in sorted(parts)]
        (DOCS / "reproductions.md").write_text("\n".join([HEAD, *ordered]))


if __name__ == "__main__":
    main()
