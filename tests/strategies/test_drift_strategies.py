"""FedAMD (arXiv 2206.05891), SCAFFOLD (1910.06378), FedDyn (2111.04263), FedProx: invariants and limits."""

from __future__ import annotations

import numpy as np
import pytest
from quadratic_clients import Quadratic, federation, pooled_optimum, run_round
from vectors import Vector, one_round, prepared, random_updates, step_of

from turnout.strategies import (
    FedAMD,
    FedAvg,
    FedDyn,
    FedProx,
    Reply,
    Scaffold,
    StreamingStrategy,
    suggested_anchor_probability,
)
from turnout.wire import ConfigError

M, SIZE = 8, 4


def full_gradient(clients: list[Quadratic], x: Vector) -> Vector:
    return np.mean([client.gradient(x) for client in clients], axis=0)


def roles(strategy: FedAMD, t: int, available: list[int]) -> dict[int, str]:
    strategy.begin_round(t, range(M))
    return {node: asked.local_update for node, asked in strategy.select(t, available).items()}


class TestFedAMDRounds:
    def test_anchors_alone_leave_the_model_to_the_bit_and_cache_their_gradients(self) -> None:
        clients, x = federation(0, M, SIZE), np.random.default_rng(0).standard_normal(SIZE)
        strategy = prepared(FedAMD(server_lr=0.7), x=x)
        run_round(strategy, 1, clients)
        assert strategy.x.tobytes() == x.tobytes()
        for i, client in enumerate(clients):
            np.testing.assert_array_equal(strategy.bullseyes.get(i), client.gradient(x))
        np.testing.assert_allclose(strategy.mean_bullseye(), full_gradient(clients, x), rtol=1e-14)
        assert strategy.diagnostics() == {"miners": 0, "anchors": M, "remembered-clients": M}

    def test_miners_alone_leave_the_cache(self) -> None:
        strategy = prepared(FedAMD(schedule="sequential", period=5))
        clients = federation(0, M, SIZE)
        strategy.prepare(np.ones(SIZE))
        run_round(strategy, 1, clients)
        before = [np.array(strategy.bullseyes.get(i)) for i in range(M)]
        total = strategy.bullseyes.total.copy()
        run_round(strategy, 2, clients, [1, 4])
        assert all(np.array_equal(strategy.bullseyes.get(i), v) for i, v in enumerate(before))
        assert np.array_equal(strategy.bullseyes.total, total)

    def test_mean_over_miners_not_participants(self) -> None:
        strategy = prepared(FedAMD(cold_start=False), SIZE)
        strategy.begin_round(1, range(M))
        updates = random_updates(np.random.default_rng(1), range(2), SIZE)

        for client, role, vector in (
            (0, "miner", updates[0]),
            (1, "miner", updates[1]),
            (2, "anchor", np.ones(SIZE)),
        ):
            strategy.accept(1, Reply(client, vector, 1, float(np.abs(vector).max()), role))
        np.testing.assert_allclose(strategy.end_round(1), (updates[0] + updates[1]) / 2, rtol=1e-14)

    def test_this_rounds_anchors_count_from_the_next_round_on(self) -> None:
        clients = federation(2, M, SIZE)
        strategy = prepared(FedAMD(anchor_probability=0.5), x=np.ones(SIZE))
        for t in range(1, 12):
            cached = strategy.mean_bullseye()
            cohort = run_round(strategy, t, clients)
            for asked in cohort.values():
                if asked.local_update == "miner":
                    np.testing.assert_array_equal(asked.vectors["bullseye"], cached)
            stored = [strategy.bullseyes.get(i) for i in range(M)]
            np.testing.assert_allclose(strategy.mean_bullseye(), np.mean(stored, axis=0), rtol=1e-12)

    def test_a_client_never_reached_is_left_out_of_the_mean(self) -> None:
        clients = federation(3, M, SIZE)
        strategy = prepared(FedAMD(), x=np.ones(SIZE))
        run_round(strategy, 1, clients, [0, 1, 2])
        expected = full_gradient(clients[:3], np.ones(SIZE))
        np.testing.assert_allclose(strategy.mean_bullseye(), expected, rtol=1e-13)

    def test_fresh_cache_and_one_step_is_the_exact_gradient_step(self) -> None:
        clients = federation(4, M, SIZE)
        strategy = prepared(FedAMD(schedule="sequential"), x=np.ones(SIZE))
        run_round(strategy, 1, clients)
        cohort = run_round(strategy, 3, clients, [2, 5], steps=1, lr=0.1)
        assert {asked.local_update for asked in cohort.values()} == {"miner"}
        expected = np.ones(SIZE) - 0.1 * full_gradient(clients, np.ones(SIZE))
        np.testing.assert_allclose(strategy.x, expected, rtol=1e-13)

    def test_homogeneous_clients_equal_fedavg(self) -> None:
        one = federation(5, 1, SIZE)[0]
        clients = [Quadratic(one.hessian, one.linear) for _ in range(M)]
        ours, theirs = (
            prepared(FedAMD(schedule="sequential"), x=np.ones(SIZE)),
            prepared(FedAvg(), x=np.ones(SIZE)),
        )
        run_round(ours, 1, clients)
        run_round(ours, 3, clients, [0, 6])
        run_round(theirs, 1, clients, [0, 6])
        np.testing.assert_allclose(ours.x, theirs.x, rtol=1e-12)

    @pytest.mark.parametrize("steps", [1, 10])
    def test_the_optimum_is_a_fixed_point(self, steps: int) -> None:
        clients = federation(6, M, SIZE)
        optimum = pooled_optimum(clients)
        strategy = prepared(FedAMD(schedule="sequential"), x=optimum)
        run_round(strategy, 1, clients)
        run_round(strategy, 3, clients, [1, 3, 4], steps=steps)
        np.testing.assert_allclose(strategy.x, optimum, rtol=0, atol=1e-13)


class TestFedAMDRoles:
    def test_reproducible_and_a_clients_coin_is_its_own(self) -> None:
        one, other = prepared(FedAMD(seed=3)), prepared(FedAMD(seed=3))
        everyone = [roles(one, t, list(range(M))) for t in range(2, 40)]
        some = [roles(other, t, [6, 1, 3]) for t in range(2, 40)]
        for all_of_them, three in zip(everyone, some, strict=True):
            assert three == {node: all_of_them[node] for node in (6, 1, 3)}
        assert everyone != [roles(prepared(FedAMD(seed=4)), t, list(range(M))) for t in range(2, 40)]

    @pytest.mark.parametrize("p", [0.2, 0.8])
    def test_frequency_of_anchors(self, p: float) -> None:
        strategy = prepared(FedAMD(anchor_probability=p))
        coins = [
            role == "anchor" for t in range(2, 402) for role in roles(strategy, t, list(range(M))).values()
        ]
        assert np.mean(coins) == pytest.approx(p, abs=0.03)

    def test_sequential(self) -> None:
        strategy = prepared(FedAMD(schedule="sequential", period=3))
        kinds = [set(roles(strategy, t, [0, 5]).values()) for t in range(1, 8)]
        assert kinds == [{"anchor"}, {"miner"}, {"anchor"}, {"miner"}, {"miner"}, {"anchor"}, {"miner"}]
        warm = prepared(FedAMD(schedule="sequential", period=3, cold_start=False))
        assert set(roles(warm, 1, [0]).values()) == {"miner"}

    @pytest.mark.parametrize(("participants", "expected"), [(20, 0.887), (5, 0.778), (1, 2 / 3)])
    def test_suggested_probability(self, participants: int, expected: float) -> None:
        assert suggested_anchor_probability(participants) == pytest.approx(expected, abs=5e-4)
        with pytest.raises(ConfigError, match="num_participants"):
            suggested_anchor_probability(0)


def distance(strategy: StreamingStrategy, clients: list[Quadratic], rounds: int, **options: float) -> float:
    """Distance to the true optimum when three of the clients, drawn each round, take part."""
    prepared(strategy, x=np.full(SIZE, 3.0))
    rng = np.random.default_rng(20)
    for t in range(1, rounds + 1):
        available = rng.choice(len(clients), 3, replace=False).tolist()
        if t == 1 and isinstance(strategy, FedAMD):
            available = list(range(len(clients)))  # Its initial pass.
        run_round(strategy, t, clients, available, **options)  # type: ignore[arg-type]
    return float(np.linalg.norm(strategy.x - pooled_optimum(clients)))


class TestLimits:
    """Noise-free, strongly convex, three of eight clients a round: who reaches the true optimum."""

    def clients(self) -> list[Quadratic]:
        return federation(7, M, SIZE, examples=12, spread=2.0)

    def test_fedamd_does_and_fedavg_does_not(self) -> None:
        assert distance(FedAMD(anchor_probability=0.5), self.clients(), 600) < 1e-6
        assert distance(FedAvg(), self.clients(), 600) > 1e-2

    def test_scaffold_does(self) -> None:
        assert distance(Scaffold(), self.clients(), 900) < 1e-6

    def test_feddyn_does(self) -> None:
        assert distance(FedDyn(dyn_alpha=1.0), self.clients(), 900) < 1e-6


class TestScaffold:
    def test_c_is_the_mean_of_all_control_variates(self) -> None:
        clients, strategy = federation(8, M, SIZE), prepared(Scaffold(), x=np.ones(SIZE))
        rng = np.random.default_rng(1)
        for t in range(1, 30):
            run_round(strategy, t, clients, rng.choice(M, 3, replace=False).tolist())
            mean = np.mean([client.control for client in clients], axis=0)
            np.testing.assert_allclose(strategy.control, mean, rtol=0, atol=1e-13)

    def test_control_changes_are_divided_by_all_clients_and_updates_by_those_present(self) -> None:
        strategy = prepared(Scaffold(server_lr=0.5), SIZE)
        rng = np.random.default_rng(2)
        updates, controls = random_updates(rng, [0, 3], SIZE), random_updates(rng, [0, 3], SIZE)
        moved = step_of(strategy, 1, M, updates, role="scaffold", controls=controls)
        np.testing.assert_allclose(moved, 0.5 * (updates[0] + updates[3]) / 2, rtol=1e-14)
        np.testing.assert_allclose(strategy.control, (controls[0] + controls[3]) / M, rtol=1e-14)

    def test_an_empty_round_keeps_both(self) -> None:
        strategy = prepared(Scaffold(), SIZE)
        one_round(strategy, 1, M, {0: np.ones(SIZE)}, controls={0: np.ones(SIZE)})
        x, c = strategy.x.tobytes(), strategy.control.tobytes()
        one_round(strategy, 2, M, {})
        assert (strategy.x.tobytes(), strategy.control.tobytes()) == (x, c)


class TestFedDyn:
    def test_h_is_the_mean_of_the_clients_gradient_corrections(self) -> None:
        clients, strategy = federation(9, M, SIZE), prepared(FedDyn(dyn_alpha=0.4), x=np.ones(SIZE))
        rng = np.random.default_rng(3)
        for t in range(1, 30):
            run_round(strategy, t, clients, rng.choice(M, 3, replace=False).tolist())
            mean = np.mean([client.z for client in clients], axis=0)
            np.testing.assert_allclose(strategy.h, mean, rtol=0, atol=1e-12)

    def test_one_round_by_hand(self) -> None:
        strategy = prepared(FedDyn(dyn_alpha=0.5), x=np.full(2, 1.0))
        # w = 2 and 4: h = -0.5/4 (1 + 3), x = 3 - h / 0.5.
        x = one_round(strategy, 1, 4, {0: np.full(2, 1.0), 2: np.full(2, 3.0)}, role="dyn")
        np.testing.assert_array_equal(strategy.h, [-0.5, -0.5])
        np.testing.assert_array_equal(x, [4.0, 4.0])


class TestFedProx:
    def test_the_server_is_fedavgs(self) -> None:
        updates = random_updates(np.random.default_rng(4), [0, 2])
        examples = {0: 3, 2: 9}
        models = {
            one_round(prepared(s), 1, 4, updates, examples=examples).tobytes()
            for s in (FedAvg(), FedProx(proximal_mu=0.0), FedProx(proximal_mu=2.0))
        }
        assert len(models) == 1

    def test_mu_is_sent(self) -> None:
        strategy = prepared(FedProx(proximal_mu=0.25))
        strategy.begin_round(1, range(2))
        asked = strategy.select(1, [0, 1])
        assert {(a.local_update, a.config["proximal-mu"]) for a in asked.values()} == {("prox", 0.25)}
