"""The optimizers' studies at a reduced size: complete, and with the claims that are robust even there."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from turnout.reproduce import StudyReport, auon, classp, eco, frugal

SMALL: dict[str, Callable[..., StudyReport]] = {
    "auon": lambda **told: auon.run(
        sizes=auon.Sizes(steps=8, compared=8, seeds=1, regression_steps=8, timed=1, timed_side=64),
        workers=1,
        **told,
    ),
    "classp": lambda **told: classp.run(
        sizes=classp.Sizes(epochs_a=1, epochs_b=1, seeds=1), workers=1, **told
    ),
    "eco": lambda **told: eco.run(
        sizes=eco.Sizes(etas=(0.1, 0.03), time=15.0, steps=20, seeds=1, rates=(0.01,)), workers=1, **told
    ),
    "frugal": lambda **told: frugal.run(
        sizes=frugal.Sizes(rates=(1e-3, 3e-3), steps=60, seeds=1, rounds=2, federated_rates=(3e-3,)),
        workers=1,
        **told,
    ),
}


@cache
def outcome(slug: str) -> tuple[StudyReport, list[tuple[str, int, int]]]:
    announced: list[tuple[str, int, int]] = []
    return SMALL[slug](progress=lambda *told: announced.append(told)), announced


def claim(slug: str, words: str) -> Any:
    found = [c for c in outcome(slug)[0].claims if words in c.claim]
    assert len(found) == 1, [c.claim for c in outcome(slug)[0].claims]
    return found[0]


@pytest.mark.parametrize("slug", SMALL)
def test_report_is_complete(slug: str, tmp_path: Path) -> None:
    report, announced = outcome(slug)
    plain = report.to_json()
    assert plain["slug"] == slug
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert len({c["claim"] for c in plain["claims"]}) == len(plain["claims"]) >= 5
    assert any("reference" in table.title for table in report.tables)
    assert [done for _, done, _ in announced] == list(range(1, announced[0][2] + 1))
    for name, plot in report.plots.items():
        assert sorted(path.suffix for path in plot(tmp_path / name)) == [".png", ".svg"]


@pytest.mark.parametrize(
    ("slug", "words"),
    [
        ("auon", "AuON (paper) and NSGD-M"),
        ("auon", "AuON (code) and SGD-M"),
        ("auon", "plain AuON's step is as ill-conditioned"),
        ("auon", "Hybrid, 5 steps: the step is better conditioned"),
        ("classp", "moves less than half"),
        ("eco", "eta 0.1: ECO SR no worse than naive SR"),
        ("frugal", "numbers of state"),
        ("frugal", "lr 0.001: FRUGAL 0 lies between"),
    ],
)
def test_a_robust_claim_holds(slug: str, words: str) -> None:
    assert claim(slug, words).holds


def test_curves_that_are_apart_are_told_apart() -> None:
    """The comparison of AuON with its control sees a difference where there is one."""
    sizes = auon.Sizes(steps=8, compared=8)
    job = ("digits", auon.PAPER, 0.1, 0, sizes), ("digits", auon.ADAMW, 0.1, 0, sizes)
    runs = {part[:4]: auon.measure(part) for part in job}
    assert auon.Found(runs, sizes).apart(auon.PAPER, auon.ADAMW, 0.1) > 0.1
