"""Studies of adapters that the server has a say in, and of other adapters, at a reduced size."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from turnout.reproduce import StudyReport, adalora, hut, ist, snella, tera, weight_compander

SMALL: dict[str, Callable[..., StudyReport]] = {
    "adalora": lambda **told: adalora.run(sizes=adalora.Sizes(steps=20, seeds=1, rounds=2), **told),
    "hut": lambda **told: hut.run(sizes=hut.Sizes(width=32, steps=30, seeds=1, rounds=2), **told),
    "ist": lambda **told: ist.run(sizes=ist.Sizes(steps=4, seeds=1, rounds=1), **told),
    "snella": lambda **told: snella.run(
        sizes=snella.Sizes(fit_steps=60, fit_seeds=1, steps=20, seeds=1, rounds=6), **told
    ),
    "tera": lambda **told: tera.run(sizes=tera.Sizes(fit_steps=30, steps=20, seeds=1, rounds=2), **told),
    "weight-compander": lambda **told: weight_compander.run(
        sizes=weight_compander.Sizes(steps=60, seeds=1, rounds=2), **told
    ),
}


@cache
def outcome(slug: str) -> tuple[StudyReport, list[tuple[str, int, int]]]:
    announced: list[tuple[str, int, int]] = []
    return SMALL[slug](progress=lambda *told: announced.append(told), workers=1), announced


def holds(slug: str, words: str) -> bool:
    found = [claim for claim in outcome(slug)[0].claims if words in claim.claim]
    assert len(found) == 1, [claim.claim for claim in outcome(slug)[0].claims]
    return found[0].holds


@pytest.mark.parametrize("slug", SMALL)
def test_a_report_is_complete(slug: str, tmp_path: Path) -> None:
    report, announced = outcome(slug)
    plain: dict[str, Any] = report.to_json()
    assert plain["slug"] == slug
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert len(plain["claims"]) >= 5
    assert len({claim["claim"] for claim in plain["claims"]}) == len(plain["claims"])
    assert all(len(row) == len(table.columns) for table in report.tables for row in table.rows)
    assert announced[-1][1] == announced[-1][2]
    for name, plot in report.plots.items():
        assert sorted(path.suffix for path in plot(tmp_path / name)) == [".png", ".svg"]


def test_what_holds_whatever_the_size() -> None:
    assert holds("adalora", "no more triplets are left than the budget")
    assert holds("hut", "do not grow with the number of tokens")
    assert holds("hut", "within 10 % of")
    assert holds("hut", "keeps every zero")
    assert holds("ist", "a quarter of LoRA's bytes")
    assert holds("tera", "make a change of rank 64")
    assert holds("tera", "bytes up per round")
