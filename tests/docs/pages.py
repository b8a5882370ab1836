"""The pages of the documentation and the blocks of code in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
STRATEGY_PAGES = sorted((DOCS / "strategies").glob("*.md"))
OPTIMIZER_PAGES = sorted((DOCS / "optimizers").glob("*.md"))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page; ``place`` is its file and line."""

    place: str
    language: str
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """Return the blocks of a page in one of these languages (all, if none is named)."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        block = Block(f"{page.relative_to(REPOSITORY)}:{line}", match[1], match[2])
        if not languages or block.language in languages:
            found.append(block)
    return found
