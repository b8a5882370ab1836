"""Each study at a reduced size: its structure, and one claim that is robust even there."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turnout.reproduce import StudyReport, eggroll, fedamd, fedau, fedstale, rerce_fed_admm
from turnout.reproduce.admm_clients import AdmmClients, Channel, weak
from turnout.reproduce.drive import drive
from turnout.strategies import FedStale, RerceFed

SMALL: dict[str, Callable[..., StudyReport]] = {
    "fedstale": lambda **told: fedstale.run(
        sizes=fedstale.Sizes(
            rounds=120,
            histories=1,
            draws=1,
            betas=(0.0, 0.5, 1.0),
            sweep_betas=(0.0, 0.5, 1.0),
            often_betas=(0.0, 0.5, 1.0),
        ),
        workers=1,
        **told,
    ),
    "eggroll": lambda **told: eggroll.run(
        sizes=eggroll.Sizes(rounds=15, seeds=1, pairs=4, batch=16), workers=1, **told
    ),
    "fedamd": lambda **told: fedamd.run(sizes=fedamd.Sizes(rounds=120, seeds=1), workers=1, **told),
    "fedau": lambda **told: fedau.run(
        sizes=fedau.Sizes(
            num_clients=12, train_examples=600, test_examples=200, rounds=40, seeds=1, quadratic_rounds=1000
        ),
        workers=1,
        **told,
    ),
    "rerce-fed-admm": lambda **told: rerce_fed_admm.run(
        sizes=rerce_fed_admm.Sizes(rounds=80, tail=30, runs=2, drift_rounds=400, drift_runs=2),
        workers=1,
        **told,
    ),
}


@dataclass
class Outcome:
    report: StudyReport
    announced: list[tuple[str, int, int]]


@cache
def outcome(slug: str) -> Outcome:
    announced: list[tuple[str, int, int]] = []
    return Outcome(SMALL[slug](progress=lambda *told: announced.append(told)), announced)


def claim(slug: str, words: str) -> Any:
    found = [c for c in outcome(slug).report.claims if words in c.claim]
    assert len(found) == 1, [c.claim for c in outcome(slug).report.claims]
    return found[0]


@pytest.mark.parametrize("slug", SMALL)
def test_report_is_complete(slug: str) -> None:
    report = outcome(slug).report
    plain = report.to_json()
    assert plain["slug"] == slug == report.slug
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert len(plain["claims"]) >= 5
    assert all(isinstance(c["holds"], bool) for c in plain["claims"])
    assert len({c["claim"] for c in plain["claims"]}) == len(plain["claims"])
    assert report.seconds > 0
    assert report.tables
    for table in report.tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert any("reference" in table.title for table in report.tables)


@pytest.mark.parametrize("slug", SMALL)
def test_progress_counts_to_the_end(slug: str) -> None:
    announced = outcome(slug).announced
    assert [done for _, done, _ in announced] == list(range(1, announced[0][2] + 1))


@pytest.mark.parametrize("slug", SMALL)
def test_plots_are_written_as_png_and_svg(slug: str, tmp_path: Path) -> None:
    for name, plot in outcome(slug).report.plots.items():
        files = plot(tmp_path / name)
        assert sorted(path.suffix for path in files) == [".png", ".svg"]
        assert all(path.stat().st_size > 1000 for path in files)


def test_fedstale_half_stale_beats_both_ends() -> None:
    found = claim("fedstale", "(lr 0.05, h 0.6, p 0.1): FedStale at beta 0.5")
    assert found.measured < found.baseline


def test_fedstale_does_not_pay_without_noise() -> None:
    assert claim("fedstale", "FedVARP and MIFA win where there is no noise").holds


def test_a_claim_that_does_not_hold_is_reported() -> None:
    found = claim("fedstale", "beats MIFA")
    assert not found.holds
    assert {"claim": found.claim, "measured": found.measured, "baseline": found.baseline, "holds": False} in (
        outcome("fedstale").report.to_json()["claims"]
    )


def test_fedamd_ends_below_fedavg() -> None:
    assert claim("fedamd", "FedAMD tau 2 ends with less than 0.05 times the error of FedAvg").holds


def test_fedamd_is_slower_than_scaffold_at_first() -> None:
    assert claim("fedamd", "at first SCAFFOLD is faster").holds


def test_fedau_finds_the_optimum_of_the_quadratics() -> None:
    found = claim("fedau", "quadratics")
    assert found.holds
    assert found.baseline == pytest.approx(1.1, abs=0.3)


def test_rerce_beats_dual_admm_over_noisy_links() -> None:
    assert claim("rerce-fed-admm", "RERCE at least 4 below dual ADMM at 20/20").holds


def test_all_forms_of_admm_agree_without_noise() -> None:
    assert claim("rerce-fed-admm", "without noise").holds


def test_results_do_not_depend_on_the_number_of_processes() -> None:
    sizes = fedamd.Sizes(rounds=6, seeds=2, tail=3)
    one, two = (fedamd.run(sizes=sizes, workers=workers) for workers in (1, 2))
    assert one.to_json()["claims"] == two.to_json()["claims"]
    assert one.tables == two.tables


def test_problems_side_by_side_do_not_see_each_other() -> None:
    sizes = fedstale.Sizes(rounds=40, dimension=4, draws=1)
    both = fedstale.Quadratics((fedstale.ROWS[0], fedstale.ROWS[2]), sizes, 0)
    alone = copy.copy(both)
    alone.centres, alone.noise = both.centres[:, :4], both.noise[..., :4]
    alone.contraction, alone.start = both.contraction[:4], both.start[:4]

    def last_model(problem: fedstale.Quadratics) -> Any:
        return drive(
            FedStale(num_clients=24, participation=fedstale.participation(0.1, 24)),
            problem.start,
            num_clients=24,
            rounds=40,
            present=lambda server_round: [i for i in range(24) if i < 12 or (i + server_round) % 10 == 0],
            work=problem.work,
            observe=lambda server_round, model: None,
        )

    assert last_model(both)[:4] == pytest.approx(last_model(alone), rel=1e-9)


def test_one_gaussian_per_transmitted_vector() -> None:
    """The same vector to or from the same client in the same round carries the same noise, others another."""
    channel = Channel(3, 4, 5, sigma=0.1, seed=0)
    zero = np.zeros(4)
    first, again = channel.down(2, zero, [0, 2]), channel.down(2, zero, [2, 0])
    assert np.array_equal(first, again[::-1])
    others = [channel.down(3, zero, [0])[0], channel.up(2, zero[None], [0])[0], channel.down(2, zero, [1])[0]]
    assert all(not np.array_equal(first[0], other) for other in others)


def test_admm_without_noise_conserves_its_sum() -> None:
    """sum_k (A_k + rho I) w_k - rho K w_n = sum_k b_k after every round (arXiv 2409.13451)."""
    problem = weak(0)
    n, dimension = problem.linear.shape
    clients = AdmmClients(
        problem.curvature, problem.linear, 1.0, Channel(n, dimension, 30, sigma=0.0, seed=0)
    )
    strategy = RerceFed(num_clients=n, rho=1.0, continual=False)
    previous = [np.zeros(dimension)]

    def observe(server_round: int, model: np.ndarray[Any, Any]) -> None:
        weighted = np.einsum("kij,kj->i", problem.curvature + np.eye(dimension), clients.models)
        assert weighted - n * previous[0] == pytest.approx(problem.linear.sum(axis=0), abs=1e-9)
        previous[0] = model

    last = drive(
        strategy,
        np.zeros(dimension),
        num_clients=n,
        rounds=30,
        present=lambda _: list(range(n)),
        work=clients.work,
        observe=observe,
    )
    assert last == pytest.approx(problem.solution, abs=1e-3)
