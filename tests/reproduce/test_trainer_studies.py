"""The studies of BO-REP, field space and the loss-curvature edit at a reduced size."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from turnout.reproduce import StudyReport, bo_rep, field_space_continual, loss_curvature_edit

SMALL: dict[str, Callable[..., StudyReport]] = {
    "bo-rep": lambda **told: bo_rep.run(
        sizes=bo_rep.Sizes(steps=20, seeds=1, cleaning_rounds=9, representation_rounds=2), workers=1, **told
    ),
    "field-space-continual": lambda **told: field_space_continual.run(
        sizes=field_space_continual.Sizes(width=16, tasks=2, epochs=1, seeds=1, clients=2), workers=1, **told
    ),
    "loss-curvature-edit": lambda **told: loss_curvature_edit.run(
        sizes=loss_curvature_edit.Sizes(
            epochs=8, every=4, width=32, train_examples=120, statistics_clients=3
        ),
        workers=1,
        **told,
    ),
}


@cache
def outcome(slug: str) -> tuple[StudyReport, list[tuple[str, int, int]]]:
    announced: list[tuple[str, int, int]] = []
    return SMALL[slug](progress=lambda *told: announced.append(told)), announced


@pytest.mark.parametrize("slug", SMALL)
def test_a_study_is_complete(slug: str, tmp_path: Path) -> None:
    report, announced = outcome(slug)
    plain = report.to_json()
    assert plain["slug"] == slug
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert len(plain["claims"]) >= 5
    assert len({c["claim"] for c in plain["claims"]}) == len(plain["claims"])
    assert all(len(row) == len(table.columns) for table in report.tables for row in table.rows)
    assert any("eference" in table.title for table in report.tables)
    assert [done for _, done, _ in announced] == list(range(1, announced[0][2] + 1))
    for name, plot in report.plots.items():
        assert sorted(path.suffix for path in plot(tmp_path / name)) == [".png", ".svg"]


def claim(slug: str, words: str) -> bool:
    (found,) = [c for c in outcome(slug)[0].claims if words in c.claim]
    return found.holds


def test_ten_clients_give_the_edit_of_one_pool() -> None:
    assert claim("loss-curvature-edit", "edit of one pool")


def test_a_deployed_weight_is_one_bit() -> None:
    assert claim("field-space-continual", "one bit per weight")


def test_normalised_steps_do_not_diverge() -> None:
    assert claim("bo-rep", "no run of BO-REP diverges")
