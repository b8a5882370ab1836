"""The adapters' studies at a reduced size: complete, and the claims that do not depend on the size."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from turnout.reproduce import StudyReport, bone, lift, paca, s2ft

STEP = paca.Sizes(
    steps=40, seeds=1, ranks=(4, 16), rates=(1e-2,), chain_width=128, chain_depth=3, chain_batch=64, repeats=1
)
SMALL: dict[str, Callable[..., StudyReport]] = {
    "bone": lambda **told: bone.run(
        sizes=bone.Sizes(steps=55, seeds=1, rounds=2, rates=(1e-3,)), workers=1, **told
    ),
    "paca": lambda **told: paca.run(sizes=STEP, workers=1, **told),
    "s2ft": lambda **told: s2ft.run(
        sizes=s2ft.Sizes(steps=40, seeds=1, rates=(1e-2,), steps_measured=STEP), workers=1, **told
    ),
    "lift": lambda **told: lift.run(sizes=lift.Sizes(steps=40, seeds=2, rates=(1e-2,)), workers=1, **told),
}
every_study = pytest.mark.parametrize("slug", SMALL)


@cache
def outcome(slug: str) -> tuple[StudyReport, list[tuple[str, int, int]]]:
    announced: list[tuple[str, int, int]] = []
    return SMALL[slug](progress=lambda *told: announced.append(told)), announced


def claim(slug: str, words: str) -> Any:
    found = [c for c in outcome(slug)[0].claims if words in c.claim]
    assert len(found) == 1, [c.claim for c in outcome(slug)[0].claims]
    return found[0]


@every_study
def test_a_report_is_complete(slug: str, tmp_path: Path) -> None:
    report, announced = outcome(slug)
    plain = report.to_json()
    assert plain["slug"] == slug
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert len(plain["claims"]) >= 5
    assert any("best learning rate" in table.title for table in report.tables)
    assert any(row[0].startswith("LoRA") for table in report.tables for row in table.rows)
    assert [done for _, done, _ in announced] == list(range(1, announced[0][2] + 1))
    for name, plot in report.plots.items():
        assert sorted(path.suffix for path in plot(tmp_path / name)) == [".png", ".svg"]


@pytest.mark.parametrize("slug", SMALL)
def test_averaging_is_exact_whatever_the_size(slug: str) -> None:
    found = claim(slug, "is averaging the weights")
    assert found.holds
    assert found.measured < 1e-4


def test_bat_moves_fastest_at_the_small_rate_and_has_a_higher_rank() -> None:
    assert claim("bone", "Bat < MiSS < LoRA").holds
    assert claim("bone", "rank above").holds
    assert claim("bone", "as many as LoRA's").holds


def test_fewer_bytes_are_kept() -> None:
    assert claim("paca", "only the selected columns").holds
    assert claim("paca", "fewer bytes are kept").holds
    assert claim("s2ft", "fewer bytes are kept").holds


def test_lift_finds_principal_weights_under_noise() -> None:
    for noise in ("0.5", "1,", "2,"):
        assert claim("lift", f"under noise {noise}").holds


def test_s2ft_permutes_and_adds_up() -> None:
    assert claim("s2ft", "permuted together").holds
    assert claim("s2ft", "disjoint channels").holds
