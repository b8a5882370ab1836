"""FedStale, FedVARP, MIFA, FedAU and their relatives: the invariants of the cards, in float64.

Cards: FedStale (arXiv 2405.04171), FedVARP (2207.14130), MIFA (2106.04159), FedAU (2306.03401).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import pytest
from vectors import Vector, one_round, prepared, random_updates, step_of

from turnout.strategies import (
    MIFA,
    AverageAll,
    FedAU,
    FedAvg,
    FedStale,
    FedVARP,
    StreamingStrategy,
    UnbiasedFedAvg,
)

N = 6
P = (1.0, 0.9, 0.5, 0.3, 0.7, 0.15)
BETAS = (0.0, 0.3, 0.5, 0.85, 1.0)
Make = Callable[[], StreamingStrategy]


def stale(beta: float, p: object = P, **options: object) -> FedStale:
    return FedStale(beta=beta, participation=p, **options)  # type: ignore[arg-type]


def warm(strategy: StreamingStrategy, seed: int = 0, rounds: int = 3) -> StreamingStrategy:
    """Rounds that fill the memories; the last client never comes in them."""
    prepared(strategy)
    rng = np.random.default_rng(seed)
    for server_round in range(1, rounds + 1):
        came = [i for i in range(N - 1) if server_round == 1 or rng.random() < 0.5]
        one_round(strategy, server_round, N, random_updates(rng, came))
    return strategy


def moves(make: Make, came: list[int], *, seed: int = 0, n: int = N) -> Vector:
    """How the model moves when ``came`` take part after the warm-up."""
    return step_of(warm(make(), seed), 4, n, random_updates(np.random.default_rng([seed, 1]), came))


COHORTS = ([0, 2, 3], [5], [0, 1, 2, 3, 4, 5], [], [4, 1])
cohorts = pytest.mark.parametrize("came", COHORTS, ids=str)


class TestFedStale:
    @cohorts
    def test_beta_0_is_unbiased_fedavg_whatever_is_remembered(self, came: list[int]) -> None:
        ours, theirs = (
            moves(make, came) for make in (lambda: stale(0), lambda: UnbiasedFedAvg(participation=P))
        )
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)

    @cohorts
    def test_beta_1_is_heterogeneous_fedvarp(self, came: list[int]) -> None:
        ours, theirs = (moves(make, came) for make in (lambda: stale(1), lambda: FedVARP(participation=P)))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)

    @cohorts
    @pytest.mark.parametrize("beta", BETAS)
    def test_convex_combination(self, came: list[int], beta: float) -> None:
        zero, one, ours = (moves(lambda b=b: stale(b), came) for b in (0.0, 1.0, beta))
        np.testing.assert_allclose(ours, (1 - beta) * zero + beta * one, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("beta", BETAS)
    @pytest.mark.parametrize("seed", range(3))
    def test_everyone_always_is_the_weighted_mean(self, beta: float, seed: int) -> None:
        examples = dict(enumerate((5, 1, 20, 3, 8, 2)))
        strategy = stale(beta, 1.0, client_weights="examples")
        prepared(strategy)
        rng = np.random.default_rng(seed)
        for server_round in range(1, 4):
            updates = random_updates(rng, range(N))
            moved = step_of(strategy, server_round, N, updates, examples=examples)
            total = sum(examples.values())
            expected = sum(examples[i] / total * updates[i] for i in updates)
            np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-13)

    def test_equal_rates_is_original_fedvarp(self) -> None:
        came = [0, 2, 3]
        ours = moves(lambda: stale(1.0, len(came) / N), came)
        np.testing.assert_allclose(ours, moves(FedVARP, came), rtol=0, atol=1e-13)

    @cohorts
    def test_rates_of_one_is_mifa(self, came: list[int]) -> None:
        np.testing.assert_allclose(
            moves(lambda: stale(1.0, 1.0), came), moves(MIFA, came), rtol=0, atol=1e-13
        )

    def test_the_first_round_does_not_depend_on_beta(self) -> None:
        updates = random_updates(np.random.default_rng(3), [0, 3, 5])
        firsts = [one_round(prepared(stale(beta)), 1, N, updates) for beta in BETAS]
        assert len({first.tobytes() for first in firsts}) == 1

    def test_memory_is_overwritten_with_the_raw_update_of_the_participants_only(self) -> None:
        strategy = warm(stale(0.5))
        assert isinstance(strategy, FedStale)
        before = {i: np.array(strategy.stale.get(i)) for i in range(N - 1)}
        updates = random_updates(np.random.default_rng(4), [1, 5])
        one_round(strategy, 4, N, updates)
        for i in range(N):
            expected = updates.get(i, before.get(i))
            assert expected is not None
            assert strategy.stale.get(i).tobytes() == expected.tobytes()

    def test_running_mean_equals_recomputation(self) -> None:
        strategy = warm(stale(0.5, client_weights="examples"), rounds=150)
        assert isinstance(strategy, FedStale)
        np.testing.assert_allclose(strategy.stale.total, strategy.stale.recomputed(), rtol=0, atol=1e-13)

    def test_an_empty_round_moves_by_the_memory_or_not_at_all(self) -> None:
        strategy = warm(stale(0.4))
        assert isinstance(strategy, FedStale)
        remembered = sum(strategy.stale.get(i) for i in range(N - 1)) / N
        np.testing.assert_allclose(step_of(strategy, 4, N, {}), 0.4 * remembered, rtol=0, atol=1e-13)
        skipping = warm(stale(0.4, empty_round="skip"))
        before = skipping.x.copy()
        assert one_round(skipping, 4, N, {}).tobytes() == before.tobytes()

    def test_bounded_weights(self) -> None:
        strategy = prepared(stale(0.5, max_weight=2.0))
        moved = step_of(strategy, 1, N, {5: np.ones(5), 4: np.ones(5)})
        np.testing.assert_allclose(moved, (2.0 + 1 / 0.7) / N, rtol=1e-14)
        assert strategy.diagnostics()["max-weight"] == 2.0

    def test_estimated_rates_come_from_earlier_rounds(self) -> None:
        strategy = prepared(FedStale(beta=0.0))
        one = {1: np.ones(5)}
        steps = [step_of(strategy, t, 2, one if t % 3 == 0 else {})[0] for t in range(1, 8)]
        # Its intervals are 3 rounds long, but only after the first closed does the estimate say so.
        np.testing.assert_allclose(steps, [0, 0, 1 / 2, 0, 0, 3 / 2, 0], rtol=1e-14)


def patterns(n: int) -> Iterator[tuple[list[int], float]]:
    """All subsets of clients with their probabilities."""
    for bits in product((False, True), repeat=n):
        probability = np.prod([p if on else 1 - p for on, p in zip(bits, P[:n], strict=True)])
        yield [i for i, on in enumerate(bits) if on], float(probability)


class TestUnbiasedness:
    """Enumeration of all 2**N patterns of participation, memories given."""

    def statistics(self, make: Make) -> tuple[Vector, float, Vector]:
        strategy = warm(make())
        memory = strategy.state_dict()
        updates = random_updates(np.random.default_rng(5), range(N))
        target = sum(updates.values()) / N
        mean, second = np.zeros(5), 0.0
        for came, probability in patterns(N):
            if probability:
                fresh = prepared(make())
                fresh.load_state_dict(memory)
                moved = step_of(fresh, 4, N, {i: updates[i] for i in came})
                mean += probability * moved
                second += probability * float(np.sum((moved - target) ** 2))
        return mean, second, target

    @pytest.mark.parametrize("beta", BETAS)
    def test_fedstale(self, beta: float) -> None:
        mean, second, target = self.statistics(lambda: stale(beta))
        np.testing.assert_allclose(mean, target, rtol=0, atol=1e-12)
        strategy = warm(stale(beta))
        assert isinstance(strategy, FedStale)
        updates = random_updates(np.random.default_rng(5), range(N))
        h = {i: strategy.stale.get(i) if i < N - 1 else np.zeros(5) for i in range(N)}
        variance = sum((1 - p) / p / N**2 * np.sum((updates[i] - beta * h[i]) ** 2) for i, p in enumerate(P))
        assert second == pytest.approx(variance, rel=1e-12)

    @pytest.mark.parametrize(
        "make",
        [lambda: UnbiasedFedAvg(participation=P), lambda: FedVARP(participation=P)],
        ids=["unbiased", "fedvarp"],
    )
    def test_others_with_known_rates(self, make: Make) -> None:
        mean, _, target = self.statistics(make)
        np.testing.assert_allclose(mean, target, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("make", [FedAvg, AverageAll, MIFA, FedVARP], ids=lambda make: make.__name__)
    def test_the_biased_ones_are_biased(self, make: Make) -> None:
        mean, _, target = self.statistics(make)
        assert np.abs(mean - target).max() > 1e-3


class TestFedAU:
    def test_everyone_always_is_fedavg_exactly(self) -> None:
        rng = np.random.default_rng(6)
        rounds = [random_updates(rng, range(N)) for _ in range(5)]
        models = []
        for strategy in (FedAU(cutoff=None), FedAU(cutoff=3), FedAvg(weighting="uniform")):
            prepared(strategy)
            models.append([one_round(strategy, t, N, u).tobytes() for t, u in enumerate(rounds, start=1)])
        assert models[0] == models[1] == models[2]

    def test_a_cutoff_of_one_is_average_all_exactly(self) -> None:
        rng = np.random.default_rng(7)
        cohorts = [rng.choice(N, rng.integers(0, N), replace=False).tolist() for _ in range(12)]
        rounds = [random_updates(rng, came) for came in cohorts]
        ours, theirs = prepared(FedAU(cutoff=1)), prepared(AverageAll())
        for t, updates in enumerate(rounds, start=1):
            assert one_round(ours, t, N, updates).tobytes() == one_round(theirs, t, N, updates).tobytes()

    def test_with_exact_intervals_it_is_known_prob(self) -> None:
        periods = (1, 2, 3, 4)
        ours = prepared(FedAU(cutoff=None))
        theirs = prepared(UnbiasedFedAvg(participation=[1 / period for period in periods]))
        rng = np.random.default_rng(8)
        for t in range(1, 40):
            updates = random_updates(rng, [i for i, period in enumerate(periods) if t % period == 0])
            ours.x, theirs.x = np.zeros(5), np.zeros(5)
            a, b = one_round(ours, t, 4, updates), one_round(theirs, t, 4, updates)
            if t > 4:
                np.testing.assert_allclose(a, b, rtol=1e-13)

    def test_effective_weight_approaches_one(self) -> None:
        strategy, rng = prepared(FedAU(cutoff=None)), np.random.default_rng(9)
        weights = []
        for t in range(1, 3001):
            came = [i for i, p in enumerate(P) if rng.random() < p]
            one_round(strategy, t, N, dict.fromkeys(came, np.ones(5) * 1e-6))
            weights.append(strategy.diagnostics()["effective-weight"])
        assert np.mean(weights[500:]) == pytest.approx(1.0, abs=0.05)

    def test_two_clients_reach_the_plain_optimum_and_fedavg_does_not(self) -> None:
        centres, rates, lr = (0.0, 1.0), (1.0, 0.25), 0.02

        def limit(strategy: StreamingStrategy) -> float:
            rng = np.random.default_rng(10)
            prepared(strategy, 1)
            trail = []
            for t in range(1, 5001):
                came = [i for i in (0, 1) if rng.random() < rates[i]]
                x = one_round(strategy, t, 2, {i: lr * (centres[i] - strategy.x) for i in came})
                trail.append(x[0])
            return float(np.mean(trail[2000:]))

        weighted = rates[1] / sum(rates)
        assert limit(AverageAll()) == pytest.approx(weighted, abs=0.03)
        assert limit(FedAvg(weighting="uniform")) < weighted
        assert limit(FedAU(cutoff=None)) == pytest.approx(0.5, abs=0.04)
        assert limit(UnbiasedFedAvg(participation=rates)) == pytest.approx(0.5, abs=0.04)


class TestNoiseFree:
    @pytest.mark.parametrize("make", [MIFA, lambda: FedVARP(participation=P), lambda: stale(1.0)])
    def test_memory_methods_reach_the_optimum_without_noise(self, make: Make) -> None:
        centres = np.random.default_rng(11).standard_normal((N, 5))
        strategy, rng = prepared(make(), x=np.full(5, 3.0)), np.random.default_rng(12)
        for t in range(1, 1501):
            came = [i for i, p in enumerate(P) if rng.random() < p]
            one_round(strategy, t, N, {i: 0.02 * (centres[i] - strategy.x) for i in came})
        np.testing.assert_allclose(strategy.x, centres.mean(axis=0), atol=1e-7)


class TestOriginalFedVARP:
    def test_an_empty_round_does_not_move(self) -> None:
        strategy = warm(FedVARP())
        before = strategy.x.copy()
        assert one_round(strategy, 4, N, {}).tobytes() == before.tobytes()

    def test_the_mean_of_the_memory_is_that_before_the_round(self) -> None:
        strategy = warm(FedVARP())
        assert isinstance(strategy, FedVARP)
        y = {i: np.array(strategy.stale.get(i)) for i in range(N - 1)}
        updates = random_updates(np.random.default_rng(13), [0, 5])
        expected = sum(y.values()) / N + ((updates[0] - y[0]) + updates[5]) / 2
        np.testing.assert_allclose(step_of(strategy, 4, N, updates), expected, rtol=0, atol=1e-13)
