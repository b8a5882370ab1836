from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turnout.server import RunHistory
from turnout.server.history import OUTCOMES
from turnout.server.plots import (
    higher_is_better,
    plot_metric,
    plot_participation,
    plot_partition,
    plot_weights,
)
from turnout.server.plots.curves import broken_series
from turnout.server.plots.participation import cell_colours, cell_shares
from turnout.server.plots.pooling import MOST_CELLS, pooled
from turnout.server.plots.style import palette, series_style

_ROUNDS, _CLIENTS = 12, 5


def history(label: str = "fedavg", *, empty: tuple[int, ...] = (), weight: float = 0.5) -> RunHistory:
    rng = np.random.default_rng(3)
    mask = rng.random((_ROUNDS, _CLIENTS)) < np.linspace(0.2, 0.9, _CLIENTS)
    mask[[number - 1 for number in empty]] = False
    rounds, clients = np.nonzero(mask)
    outcome = np.full(len(rounds), OUTCOMES.index("ok"), dtype=np.int8)
    outcome[::7] = OUTCOMES.index("failed")
    steps = np.arange(_ROUNDS + 1)
    return RunHistory(
        label=label,
        num_clients=_CLIENTS,
        rounds=steps[1:],
        participants=mask.sum(axis=1),
        evaluate={"accuracy": (steps, steps / _ROUNDS), "loss": (steps, 2.0 * 0.1**steps)},
        client_round=rounds + 1,
        client=clients.astype(np.uint64),
        outcome=outcome,
        weight=np.where(outcome == 1, weight, np.nan),
    )


PLOTS: dict[str, Callable[[Path], list[Path]]] = {
    "accuracy": lambda stem: plot_metric([history(empty=(4,)), history("fedau")], "accuracy", stem),
    "loss": lambda stem: plot_metric([history()], "loss", stem),
    "not-measured": lambda stem: plot_metric([history()], "rmse", stem),
    "participation": lambda stem: plot_participation(history(empty=(4, 5)), stem),
    "weights": lambda stem: plot_weights([history()], stem),
    "weights-compared": lambda stem: plot_weights([history(str(i)) for i in range(4)], stem),
    "partition": lambda stem: plot_partition(np.eye(5), np.arange(5), stem, probabilities=np.full(5, 0.3)),
    "partition-without-participation": lambda stem: plot_partition(np.eye(5), np.arange(5), stem),
}


@pytest.mark.parametrize("name", PLOTS)
def test_plots_are_png_and_svg_and_the_same_each_time(name: str, tmp_path: Path) -> None:
    first = PLOTS[name](tmp_path / "first")
    assert [p.name for p in first] == ["first.png", "first.svg"]
    again = PLOTS[name](tmp_path / "again")
    for one, two in zip(first, again, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert first[0].read_bytes().startswith(b"\x89PNG")
    assert "<text" in first[1].read_text()  # Text stays text.


def test_plots_leave_the_users_matplotlib_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_metric([history()], "accuracy", tmp_path / "a")
    assert dict(matplotlib.rcParams) == before


def test_an_empty_round_is_a_gap_not_a_line() -> None:
    rounds, values = broken_series(history(empty=(4, 9)), "accuracy")
    assert rounds.tolist() == list(range(_ROUNDS + 1))
    assert np.flatnonzero(np.isnan(values)).tolist() == [4, 9]


def test_an_empty_round_is_a_gap_even_where_nothing_was_evaluated() -> None:
    full = history(empty=(4,))
    rare = RunHistory(**{**vars(full), "evaluate": {"accuracy": (np.array([0, 3, 6]), np.ones(3))}})
    rounds, values = broken_series(rare, "accuracy")
    assert rounds.tolist() == [0, 3, 4, 6]
    assert np.isnan(values).tolist() == [False, False, True, False]


def test_runs_without_a_round_or_a_finite_value_can_be_plotted(tmp_path: Path) -> None:
    none = np.empty(0, np.int64)
    nothing = RunHistory(
        label="x", num_clients=3, rounds=none, participants=none, evaluate={}, client_round=none,
        client=none.astype(np.uint64), outcome=none, weight=np.empty(0),
    )  # fmt: skip
    for name, plot in (("p", plot_participation), ("w", lambda h, stem: plot_weights([h], stem))):
        assert all(path.exists() for path in plot(nothing, tmp_path / name))
    diverged = RunHistory(**{**vars(history()), "evaluate": {"loss": (np.arange(3), np.full(3, np.nan))}})
    assert "diverged" in plot_metric([diverged], "loss", tmp_path / "l")[1].read_text()


# The numbers behind the plots.


def test_shares_presence_and_inequality() -> None:
    equal = RunHistory(
        label="x", num_clients=4, rounds=np.array([1, 2]), participants=np.array([4, 4]), evaluate={},
        client_round=np.repeat([1, 2], 4), client=np.tile(np.arange(4, dtype=np.uint64), 2),
        outcome=np.ones(8, np.int8), weight=np.full(8, 0.25),
    )  # fmt: skip
    assert equal.presence().tolist() == [1.0] * 4
    assert equal.weight_shares().tolist() == [0.25] * 4
    assert equal.weight_gini() == pytest.approx(0.0)
    alone = RunHistory(**{**vars(equal), "weight": np.tile([1.0, 0, 0, 0], 2)})
    assert alone.weight_gini() == pytest.approx(0.75)  # (N - 1) / N: one client decided alone.


def test_large_client_ids_have_rows_of_their_own() -> None:
    ids = np.array([2**64 - 1, 7, 2**63], dtype=np.uint64)
    odd = RunHistory(
        label="x", num_clients=3, rounds=np.array([1]), participants=np.array([3]), evaluate={},
        client_round=np.ones(3, np.int64), client=ids, outcome=np.ones(3, np.int8),
        weight=np.array([1.0, 2, 3]),
    )  # fmt: skip
    assert odd.clients().tolist() == sorted(ids.tolist())
    assert odd.weight_shares().tolist() == [2 / 6, 3 / 6, 1 / 6]
    assert cell_shares(odd, np.arange(3))[OUTCOMES.index("ok")].tolist() == [[1], [1], [1]]


def invitations(num_clients: int, rounds: int, *entries: tuple[int, int, str]) -> RunHistory:
    """A run of (client, round, outcome)."""
    clients, numbers, outcomes = zip(*entries, strict=True)
    return RunHistory(
        label="x", num_clients=num_clients, rounds=np.arange(1, rounds + 1),
        participants=np.bincount(numbers, minlength=rounds + 1)[1:], evaluate={},
        client_round=np.array(numbers), client=np.array(clients, np.uint64),
        outcome=np.array([OUTCOMES.index(o) for o in outcomes], np.int8), weight=np.ones(len(clients)),
    )  # fmt: skip


def test_more_cells_than_pixels_share_colours() -> None:
    always = [(1, number, "ok") for number in range(1, 1701)]
    run = invitations(3, 1700, (0, 1, "ok"), *always, (2, 1700, "failed"))
    shares = cell_shares(run, np.array([0, 1, 2]))
    assert shares.shape == (len(OUTCOMES), 3, 567)
    ok = shares[OUTCOMES.index("ok")]
    assert (ok[0, 0], ok[0, 1], ok[1, 0], ok[1, 566]) == (1 / 3, 0, 1, 1)
    image = cell_colours(shares)
    assert not np.allclose(image[0, 0], image[1, 0])  # A third of the rounds is paler than all of them.
    assert not np.allclose(image[0, 0], image[0, 1])
    assert np.allclose(image[2, -1], cell_colours(np.eye(5)[2].reshape(5, 1, 1))[0, 0])


def test_rows_follow_the_order_given() -> None:
    run = invitations(3, 1, (2, 1, "ok"))
    assert cell_shares(run, np.array([2, 0, 1]))[OUTCOMES.index("ok")].tolist() == [[1], [0], [0]]


def test_a_hundred_thousand_clients_are_drawn_as_eight_hundred(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    entries = [(int(c), number, "ok") for number in (1, 2, 3) for c in rng.choice(100_000, 50, replace=False)]
    run = invitations(100_000, 3, *entries)
    shares = cell_shares(run, np.argsort(-run.presence(), kind="stable"))
    assert shares.shape == (len(OUTCOMES), MOST_CELLS, 3)
    assert cell_colours(shares)[0].min() < 0.5  # The few who came are seen.
    drawn = [
        *plot_participation(run, tmp_path / "p"),
        *plot_weights([run], tmp_path / "w"),
        *plot_partition(np.full((100_000, 2), 0.5), np.arange(100_000), tmp_path / "d"),
    ]
    assert max(path.stat().st_size for path in drawn) < 500_000


def test_pooling_keeps_the_mean_of_every_value() -> None:
    values = np.arange(2 * MOST_CELLS + 1.0)
    means = pooled(values)
    assert len(means) <= MOST_CELLS
    assert means[:2].tolist() == [1.0, 4.0]
    assert pooled(values[:MOST_CELLS]).tolist() == values[:MOST_CELLS].tolist()
    assert pooled(np.ones((5000, 3))).shape == (715, 3)


def test_directions() -> None:
    assert higher_is_better("accuracy")
    assert not higher_is_better("loss")
    assert not higher_is_better("nmsd")


# The palette.

_DICHROMACY = {
    "none": np.eye(3),
    # Machado, Oliveira and Fernandes (2009), severity 1, in linear RGB.
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.3039],
    ],
}


def linear(colour: str) -> Any:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: Any) -> Any:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", _DICHROMACY)
@pytest.mark.parametrize("group", ["series", "outcomes"])
def test_colours_differ_for_colour_blind_readers(vision: str, group: str) -> None:
    colours = palette()[group]
    colours = colours.values() if isinstance(colours, dict) else colours
    seen = [lab(np.array(_DICHROMACY[vision]) @ linear(colour)) for colour in colours]
    closest = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))
    assert closest > 13


def test_lines_stand_out_from_the_background() -> None:
    for colour in palette()["series"]:
        luminance = linear(colour) @ [0.2126, 0.7152, 0.0722]
        assert 1.05 / (luminance + 0.05) >= 3.0


def test_more_lines_than_colours_are_told_apart_by_dashes() -> None:
    styles = [str(sorted(series_style(index).items(), key=str)) for index in range(13)]
    assert len(set(styles)) == 13
