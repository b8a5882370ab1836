"""RERCE-Fed and dual ADMM (arXiv 2409.13451) with exact quadratic clients and no noise: the invariants."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from quadratic_clients import Quadratic, federation, pooled_optimum, run_round
from vectors import Vector, prepared

from turnout.strategies import DualADMM, FedDyn, RerceFed, StreamingStrategy
from turnout.wire import ConfigError

K, SIZE, RHO = 6, 5, 0.7
Make = Callable[..., StreamingStrategy]
FORMS: dict[str, Make] = {
    "scheduled": lambda **o: RerceFed(continual=False, **o),
    "continual": lambda **o: RerceFed(continual=True, **o),
    "two-copies": lambda **o: DualADMM(form="two-copies", **o),
    "dual": lambda **o: DualADMM(form="dual", **o),
}
every_form = pytest.mark.parametrize("form", sorted(FORMS))


def textbook(
    clients: list[Quadratic], w0: Vector, rho: float, rounds: int
) -> tuple[list[Vector], list[Vector]]:
    """Consensus ADMM as the card writes it: all local models and the consensus after each iteration."""
    z = [np.zeros_like(w0) for _ in clients]
    w, local, consensus = w0, [], []
    models: list[Vector] = []
    for n in range(rounds):
        if n:
            z = [z_k + rho * (w_k - w) for z_k, w_k in zip(z, models, strict=True)]
        models = [c.solve(rho, c.linear - z_k + rho * w) for c, z_k in zip(clients, z, strict=True)]
        w = sum(w_k + z_k / rho for w_k, z_k in zip(models, z, strict=True)) / len(clients)
        local.append(np.array(models))
        consensus.append(w)
    return local, consensus


def start_at(seed: int | None) -> Vector:
    return np.zeros(SIZE) if seed is None else np.random.default_rng(seed).standard_normal(SIZE)


class TestFullParticipation:
    @every_form
    @pytest.mark.parametrize("seed", [None, 3])
    def test_all_forms_are_the_textbook_iteration(self, form: str, seed: int | None) -> None:
        clients, w0 = federation(0, K, SIZE, examples=3), start_at(seed)
        local, consensus = textbook(clients, w0, RHO, 60)
        strategy = prepared(FORMS[form](rho=RHO), x=w0)
        for n in range(60):
            run_round(strategy, n + 1, clients)
            models = np.array([client.w for client in clients])
            np.testing.assert_allclose(models, local[n], rtol=0, atol=1e-8)
            if form in ("scheduled", "dual", "two-copies"):
                np.testing.assert_allclose(strategy.x, consensus[n], rtol=0, atol=1e-8)

    def test_conserved_quantity(self) -> None:
        clients, w0 = federation(1, K, SIZE), start_at(5)
        strategy = prepared(RerceFed(rho=RHO, continual=False), x=w0)
        total = sum(client.linear for client in clients)
        for n in range(40):
            consensus = strategy.x
            run_round(strategy, n + 1, clients)
            left = sum((c.hessian + RHO * np.eye(SIZE)) @ c.w for c in clients) - RHO * K * consensus
            np.testing.assert_allclose(left, total, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("seed", [None, 7])
    def test_what_rerce_sends_is_feddyns_model(self, seed: int | None) -> None:
        w0 = start_at(seed)
        ours, theirs = federation(2, K, SIZE), federation(2, K, SIZE)
        rerce, feddyn = (
            prepared(RerceFed(rho=RHO, continual=False), x=w0),
            prepared(FedDyn(dyn_alpha=RHO), x=w0),
        )
        for n in range(60):
            run_round(rerce, n + 1, ours)
            run_round(feddyn, n + 1, theirs)
            np.testing.assert_allclose(rerce.broadcast(), feddyn.x, rtol=0, atol=1e-10)
            for a, b in zip(ours, theirs, strict=True):  # The same local problem too.
                np.testing.assert_allclose(a.w, b.w, rtol=0, atol=1e-10)

    @every_form
    def test_limit_is_the_pooled_solution(self, form: str) -> None:
        # Three examples for five unknowns: no client could find it alone.
        clients = federation(3, K, SIZE, examples=3)
        strategy = prepared(FORMS[form](rho=RHO), x=np.zeros(SIZE))
        for n in range(600):
            run_round(strategy, n + 1, clients)
        optimum = pooled_optimum(clients)
        for client in clients:
            np.testing.assert_allclose(client.w, optimum, rtol=0, atol=1e-8)
        np.testing.assert_allclose(strategy.x, optimum, rtol=0, atol=1e-8)

    def test_a_wrong_extrapolation_spoils_the_limit_for_good(self) -> None:
        # Any consensus is a fixed point: the data enter through the start alone.
        clients = federation(3, K, SIZE, examples=3)
        strategy = prepared(RerceFed(rho=RHO, continual=False), x=np.zeros(SIZE))
        for n in range(600):
            if n == 1:
                strategy.previous = strategy.previous + 0.1
            run_round(strategy, n + 1, clients)
        assert np.abs(strategy.x - pooled_optimum(clients)).max() > 1e-3

    @every_form
    def test_one_client(self, form: str) -> None:
        clients = federation(4, 1, SIZE, examples=9)
        strategy = prepared(FORMS[form](rho=RHO), x=np.zeros(SIZE))
        for n in range(300):
            before = strategy.x
            run_round(strategy, n + 1, clients)
            if form == "scheduled":
                np.testing.assert_array_equal(strategy.broadcast(), 2 * strategy.x - before)
        np.testing.assert_allclose(clients[0].w, pooled_optimum(clients), rtol=0, atol=1e-8)

    @every_form
    def test_equal_clients_stay_equal(self, form: str) -> None:
        one = federation(5, 1, SIZE)[0]
        clients = [Quadratic(one.hessian, one.linear) for _ in range(4)]
        strategy = prepared(FORMS[form](rho=RHO), x=np.zeros(SIZE))
        for n in range(20):
            run_round(strategy, n + 1, clients)
            assert np.ptp(np.array([client.w for client in clients]), axis=0).max() == 0


class TestScheduling:
    def schedule(self, strategy: StreamingStrategy, t: int, available: list[int]) -> list[int]:
        strategy.begin_round(t, range(10))
        return list(strategy.select(t, available))

    @pytest.mark.parametrize("form", ["scheduled", "continual", "two-copies"])
    def test_as_many_as_asked_for_and_everyone_alike(self, form: str) -> None:
        strategy = prepared(FORMS[form](clients_per_round=3))
        counts = np.zeros(10)
        for t in range(2, 602):
            cohort = self.schedule(strategy, t, list(range(10)))
            assert len(set(cohort)) == 3
            counts[cohort] += 1
        assert np.abs(counts / 600 - 0.3).max() < 0.08

    def test_the_draw_is_the_rounds_and_not_the_order_of_node_ids(self) -> None:
        one, other = prepared(RerceFed(clients_per_round=3)), prepared(RerceFed(clients_per_round=3))
        seeded = prepared(RerceFed(clients_per_round=3, seed=1))
        cohorts = [self.schedule(one, t, list(range(10))) for t in range(2, 30)]
        assert cohorts == [self.schedule(other, t, list(range(9, -1, -1))) for t in range(2, 30)]
        assert cohorts != [self.schedule(seeded, t, list(range(10))) for t in range(2, 30)]
        assert self.schedule(one, 7, list(range(10))) == cohorts[5]  # Whatever came before.

    def test_fewer_present_than_wanted(self) -> None:
        strategy = prepared(RerceFed(clients_per_round=3))
        assert self.schedule(strategy, 2, [4, 1]) == [1, 4]
        assert self.schedule(strategy, 3, []) == []

    @pytest.mark.parametrize(("form", "expected"), [("continual", 10), ("dual", 10), ("scheduled", 3)])
    def test_slots_start_with_one_upload_from_everyone(self, form: str, expected: int) -> None:
        strategy = prepared(FORMS[form](clients_per_round=3))
        assert len(self.schedule(strategy, 1, list(range(10)))) == expected
        assert len(self.schedule(strategy, 2, list(range(10)))) == 3

    @every_form
    def test_w0_goes_to_clients_not_heard_of_before_only(self, form: str) -> None:
        w0 = start_at(9)
        clients = federation(6, K, SIZE)
        strategy = prepared(FORMS[form](rho=RHO), x=w0)
        for t, (available, new) in enumerate([([0, 1], {0, 1}), ([1, 2], {2}), ([0, 1, 2, 5], {5})], start=1):
            cohort = run_round(strategy, t, clients, available)
            assert {node for node, asked in cohort.items() if "initial" in asked.vectors} == new
            for node in new:
                np.testing.assert_array_equal(cohort[node].vectors["initial"], w0)
            assert {asked.reply for asked in cohort.values()} == {"model"}

    def test_the_unscheduled_keep_their_model_or_catch_up(self) -> None:
        # Continual: the same as if every client had iterated in every round.
        lazy, eager = federation(7, K, SIZE), federation(7, K, SIZE)
        strategy = prepared(RerceFed(rho=RHO, clients_per_round=2), x=np.zeros(SIZE))
        consensus = np.zeros(SIZE)
        for t in range(1, 30):
            cohort = run_round(strategy, t, lazy)
            if t == 1:
                received, slots = [np.zeros(SIZE)] * K, []
                for client in eager:
                    client.w = client.solve(RHO, client.linear)
                    slots.append(2 * client.w)
            else:
                for k, client in enumerate(eager):
                    assert client.w is not None
                    received[k] = consensus if k in cohort else received[k]
                    new = client.relax(RHO, received[k])
                    slots[k] = 2 * new - client.w if k in cohort else slots[k]
                    client.w = new
            consensus = np.mean(slots, axis=0)
            np.testing.assert_allclose(strategy.x, consensus, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("form", ["continual", "dual", "scheduled"])
    def test_partial_schedules_reach_a_consensus(self, form: str) -> None:
        clients = federation(8, K, SIZE, examples=9)
        strategy = prepared(FORMS[form](rho=0.3, clients_per_round=2), x=np.zeros(SIZE))
        optimum = pooled_optimum(clients)
        for t in range(1, 801):
            run_round(strategy, t, clients)
        models = np.array([client.w for client in clients])
        assert np.ptp(models, axis=0).max() < 1e-3
        # Without the dual any consensus is a fixed point, and who was scheduled early decides which.
        assert np.abs(strategy.x - optimum).max() < (1e-6 if form == "dual" else 1.0)


class TestEmptyIterations:
    @every_form
    def test_nothing_changes(self, form: str) -> None:
        clients = federation(9, K, SIZE)
        strategy = prepared(FORMS[form](rho=RHO), x=np.zeros(SIZE))
        for t in range(1, 4):
            run_round(strategy, t, clients)
        x, sent = strategy.x.tobytes(), np.array(strategy.broadcast()).tobytes()
        assert strategy.diagnostics()["primal-residual"] > 0
        run_round(strategy, 4, clients, [])
        assert strategy.x.tobytes() == x
        assert np.array(strategy.broadcast()).tobytes() == sent
        assert strategy.diagnostics()["primal-residual"] == 0

    def test_more_per_round_than_there_are(self) -> None:
        strategy = prepared(RerceFed(clients_per_round=4))
        with pytest.raises(ConfigError, match="clients_per_round=4, but only 3 clients are registered"):
            strategy.begin_round(1, range(3))
