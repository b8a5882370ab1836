"""FedAU's estimator: its card's invariants (arXiv 2306.03401), by hand, by brute force, in the long run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_rules import Intervals

from turnout.strategies import ParticipationEstimator
from turnout.wire import ConfigError

histories = st.lists(st.booleans(), min_size=1, max_size=60)
cutoffs = st.none() | st.integers(1, 9)


def weights_used(history: list[bool], cutoff: int | None) -> tuple[list[float], ParticipationEstimator]:
    """The weight of client 0 in each round of ``history``, and the estimator after it."""
    estimator = ParticipationEstimator(cutoff)
    estimator.register(0, 1)
    used = []
    for server_round, came in enumerate(history, start=1):
        used.append(estimator.weight(0, server_round))
        estimator.observe(server_round, [0] if came else [])
    return used, estimator


def long_run(mask: np.ndarray, cutoff: int | None) -> float:
    _, estimator = weights_used(mask.astype(bool).tolist(), cutoff)
    return estimator.weight(0, len(mask) + 1)


class TestByHand:
    HISTORY = (0, 1, 0, 0, 0, 0, 0, 1, 1)

    def test_the_cards_sequence(self) -> None:
        used, estimator = weights_used([bool(x) for x in self.HISTORY], 4)
        assert used == [1, 1, 2, 2, 2, 2, 3, 3, 8 / 3]
        assert estimator.weight(0, 10) == 9 / 4

    def test_without_cutoff(self) -> None:
        used, estimator = weights_used([bool(x) for x in self.HISTORY], None)
        assert used == [1, 1, 2, 2, 2, 2, 2, 2, 4]
        assert estimator.weight(0, 10) == 3


class TestInvariants:
    @given(histories, cutoffs)
    def test_equals_the_mean_of_the_interval_list(self, history: list[bool], cutoff: int | None) -> None:
        used, estimator = weights_used(history, cutoff)
        reference = Intervals(cutoff)
        reference.register([0])
        for weight, came in zip(used, history, strict=True):
            assert weight == pytest.approx(reference.omega(0), rel=1e-15)
            reference.observe({0} if came else set())
        assert estimator.weight(0, len(history) + 1) == pytest.approx(reference.omega(0), rel=1e-15)
        assert estimator.open_interval(0, len(history)) == reference.open[0]

    @given(histories, cutoffs)
    def test_bounds(self, history: list[bool], cutoff: int | None) -> None:
        used, estimator = weights_used(history, cutoff)
        bound = np.inf if cutoff is None else cutoff
        assert all(1 <= weight <= bound for weight in used)
        for server_round in range(1, len(history) + 1):
            _, part = weights_used(history[:server_round], cutoff)
            assert part.open_interval(0, server_round) < bound
        assert estimator.open_interval(0, len(history)) <= len(history)

    @given(histories, cutoffs)
    def test_conservation(self, history: list[bool], cutoff: int | None) -> None:
        _, estimator = weights_used(history, cutoff)
        rounds = len(history)
        _, intervals = estimator._settled(0, rounds)
        closed = estimator.weight(0, rounds + 1) * intervals  # Sum of the closed intervals.
        assert closed + estimator.open_interval(0, rounds) == pytest.approx(rounds, rel=1e-12)

    @given(histories, cutoffs, st.booleans())
    def test_depends_on_the_past_only(self, history: list[bool], cutoff: int | None, last: bool) -> None:
        used, _ = weights_used(history, cutoff)
        changed, _ = weights_used([*history[:-1], last], cutoff)
        assert used == changed

    @given(cutoffs, st.integers(1, 40))
    def test_always_there(self, cutoff: int | None, rounds: int) -> None:
        used, estimator = weights_used([True] * rounds, cutoff)
        assert used == [1.0] * rounds
        assert estimator.weight(0, rounds + 1) == 1.0

    @given(histories)
    def test_cutoff_of_one(self, history: list[bool]) -> None:
        used, _ = weights_used(history, 1)
        assert set(used) == {1.0}

    @given(histories, cutoffs, st.integers(0, 59))
    def test_state_round_trip(self, history: list[bool], cutoff: int | None, at: int) -> None:
        at = min(at, len(history))
        used, _ = weights_used(history, cutoff)
        _, first = weights_used(history[:at], cutoff) if at else ([], ParticipationEstimator(cutoff))
        first.register(0, 1)
        second = ParticipationEstimator(cutoff)
        second.load_state_dict(first.state_dict())
        for server_round, came in enumerate(history[at:], start=at + 1):
            assert second.weight(0, server_round) == used[server_round - 1]
            second.observe(server_round, [0] if came else [])

    @given(st.lists(st.sets(st.integers(0, 4)), max_size=30), cutoffs)
    def test_clients_do_not_mix(self, rounds: list[set[int]], cutoff: int | None) -> None:
        together = ParticipationEstimator(cutoff)
        for client in range(5):
            together.register(client, 1)
        for server_round, came in enumerate(rounds, start=1):
            together.observe(server_round, came)
        for client in range(5):
            _, alone = weights_used([client in came for came in rounds], cutoff)
            assert together.weight(client, len(rounds) + 1) == alone.weight(0, len(rounds) + 1)

    def test_a_client_that_registers_later_starts_then(self) -> None:
        estimator = ParticipationEstimator()
        estimator.register(3, 10)
        estimator.observe(10, [])
        estimator.observe(11, [3])
        assert estimator.weight(3, 12) == 2
        estimator.register(3, 12)  # Registered already: kept.
        assert estimator.weight(3, 12) == 2

    def test_someone_not_registered_counts_from_its_first_round(self) -> None:
        estimator = ParticipationEstimator()
        estimator.observe(5, [8])
        assert estimator.weight(8, 6) == 1


ROUNDS = 40_000


class TestLongRun:
    @pytest.mark.parametrize("p", [0.9, 0.3, 0.05])
    def test_bernoulli(self, p: float) -> None:
        mask = np.random.default_rng(0).random(ROUNDS) < p
        assert long_run(mask, None) == pytest.approx(1 / p, rel=0.05)
        for cutoff in (3, 20):
            expected = (1 - (1 - p) ** cutoff) / p
            assert long_run(mask, cutoff) == pytest.approx(expected, rel=0.03)
            assert expected <= min(cutoff, 1 / p) + 1e-12

    @pytest.mark.parametrize(("on", "cycle"), [(1, 10), (25, 100), (99, 100)])
    def test_cyclic_is_exact(self, on: int, cycle: int) -> None:
        mask = np.arange(ROUNDS) % cycle >= cycle - on  # Off first.
        assert long_run(mask, None) == pytest.approx(cycle / on, rel=1e-12)

    def test_markov(self) -> None:
        p, on = 0.25, 0.05
        off, rng = on * (1 / p - 1), np.random.default_rng(1)
        draws, state, mask = rng.random(ROUNDS), False, np.zeros(ROUNDS, bool)
        for t, u in enumerate(draws):
            state = u >= off if state else u < on
            mask[t] = state
        assert long_run(mask, None) == pytest.approx(1 / p, rel=0.1)


@pytest.mark.parametrize("cutoff", [0, -1, 2.5, "50", True])
def test_bad_cutoffs(cutoff: object) -> None:
    with pytest.raises(ConfigError, match=r"cutoff must be a whole number of at least 1 or None, got "):
        ParticipationEstimator(cutoff)  # type: ignore[arg-type]
