"""Every test that docs/reliability.md names exists: a reproducer cannot be removed unseen."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_named_test_exists() -> None:
    named = NAMED.findall((REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not re.search(rf"^def {name}\(", (REPOSITORY / file).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert missing == []
