"""ADMM clients of RERCE-Fed: the client-side invariants of its card (arXiv 2409.13451)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from turnout.tasks import Wls
from turnout.tasks.least_squares import Design, LeastSquaresTask
from turnout.tasks.quadratic import QuadraticSolver
from turnout.wire import ConfigError

RHO = 0.4
ROUNDS = 12


def exact_step(task, k, rho, w, s):
    """The card's step with dense matrices: (I - rho N_k) w + rho N_k s."""
    a, _ = task.curvature(k)
    n = np.linalg.inv(a + rho * np.eye(len(a)))
    return w - rho * n @ w + rho * n @ s


def start(task, k, rho, w_0):
    a, b = task.curvature(k)
    return np.linalg.solve(a + rho * np.eye(len(a)), b + rho * w_0)


class Federation:
    """All clients of a task and the server's part of each form of the algorithm."""

    def __init__(self, ask, task, **options):
        self.clients = [ask(task, k, **options) for k in range(task.num_clients)]
        self.w_0 = np.zeros(task.dimension)
        self.round = 0

    def ask(self, k, vector, local_update="admm", **config):
        answer = self.clients[k].train(
            vector,
            local_update,
            server_round=self.round,
            config={"rho": RHO, **config},
            records={"initial": self.w_0},
        )
        return answer.vector

    def local_model(self, k, local_update="admm", **config):
        return (
            self.clients[k]
            .train(
                self.w_0,
                local_update,
                server_round=self.round,
                config={"rho": RHO, **config},
                records={"initial": self.w_0},
                message_type="query.local_model",
            )
            .vector
        )

    def run(self, form, rounds=ROUNDS):
        """Return the global model per round and the local models after the last; all are scheduled."""
        config = {"continual": form == "continual", "extrapolate": form == "two-copies"}
        local_update = "dual-admm" if form == "dual" else "admm"
        if form == "dual":
            config = {}
        old = w = self.w_0
        trajectory = []
        for self.round in range(1, rounds + 1):
            sent = 2 * w - old if form == "rerce" else w
            replies = [self.ask(k, sent, local_update, **config) for k in range(len(self.clients))]
            old, w = w, np.mean(replies, axis=0)
            trajectory.append(w)
        return trajectory, [self.local_model(k, local_update, **config) for k in range(len(self.clients))]


def test_invariant_1_four_forms_one_trajectory(quadratic, ask):
    reference, local = Federation(ask, quadratic).run("rerce")
    for form in ("dual", "continual", "two-copies"):
        trajectory, models = Federation(ask, quadratic).run(form)
        if form == "continual":  # Its server's mean is of s_k = 2 w_new - w_old.
            w = [Federation(ask, quadratic).w_0, *reference]
            expected = [2 * b - a for a, b in pairwise(w)]
            np.testing.assert_allclose(trajectory, expected, atol=1e-8)
        else:
            np.testing.assert_allclose(trajectory, reference, atol=1e-8)
        np.testing.assert_allclose(models, local, atol=1e-8)


def test_invariant_2_conserved_quantity(quadratic, ask):
    federation = Federation(ask, quadratic)
    trajectory, local = federation.run("rerce")
    matrices = [quadratic.curvature(k) for k in range(4)]
    kept = sum((a + RHO * np.eye(5)) @ w for (a, _), w in zip(matrices, local, strict=True))
    kept = kept - RHO * 4 * trajectory[-2]
    np.testing.assert_allclose(kept, sum(b for _, b in matrices), atol=1e-12)


def test_invariant_3_the_limit_is_the_pooled_solution(quadratic, ask):
    trajectory, local = Federation(ask, quadratic).run("rerce", rounds=400)
    np.testing.assert_allclose(trajectory[-1], quadratic.solution, atol=1e-9)
    assert quadratic.nmsd(np.stack(local)) < 1e-18


def test_first_round_is_the_local_solve(quadratic, ask):
    w_0 = np.arange(5.0)
    answer = ask(quadratic, 2).train(w_0, "admm", config={"rho": RHO})
    np.testing.assert_allclose(answer.vector, start(quadratic, 2, RHO, w_0), rtol=1e-12)


def test_later_first_contact_is_the_local_solve_and_one_step(quadratic, ask):
    s, w_0 = np.ones(5), np.zeros(5)
    client = ask(quadratic, 2)
    answer = client.train(s, "admm", server_round=6, config={"rho": RHO}, records={"initial": w_0})
    expected = exact_step(quadratic, 2, RHO, start(quadratic, 2, RHO, w_0), s)
    np.testing.assert_allclose(answer.vector, expected, rtol=1e-10)


def test_lost_state_is_an_error_and_no_bias(quadratic, ask):
    with pytest.raises(ConfigError, match="'initial'"):
        ask(quadratic).train(np.ones(5), "admm", server_round=3, config={"rho": RHO})


def test_invariant_5_a_client_without_curvature_copies_what_it_hears(ask):
    empty = Design(np.zeros((3, 4)), np.zeros(3), np.ones(3))
    full = Design(np.eye(4), np.arange(4.0), np.ones(4))
    task = LeastSquaresTask((empty, full))
    task.name = "half-empty"
    client = ask(task)
    config, s = {"rho": 0.3}, np.array([0.1, 0.7, -1.3, 1e9])
    client.train(np.zeros(4), "admm", config=config)
    np.testing.assert_array_equal(client.train(s, "admm", server_round=2, config=config).vector, s)


def test_invariant_6_extreme_rho(quadratic):
    w, s = np.arange(5.0), np.ones(5)
    np.testing.assert_allclose(quadratic.admm_solver(0, 1e12).step(w, s), s, rtol=1e-10)
    np.testing.assert_allclose(quadratic.admm_solver(0, 1e-12).step(w, s), w, atol=1e-9)


def test_invariant_7_the_step_matrix_and_its_eigenvalues():
    task = Wls(num_clients=6, dimension=16, min_examples=6, max_examples=20)
    for k in range(6):
        a, b = task.curvature(k)
        solver = task.admm_solver(k, RHO)
        n = np.linalg.inv(a + RHO * np.eye(16))
        step = np.stack([solver.step(column, np.zeros(16)) for column in np.eye(16)], axis=1)
        np.testing.assert_allclose(step, n @ a, atol=1e-7)
        np.testing.assert_allclose(step, np.eye(16) - RHO * n, atol=1e-7)
        eigenvalues = np.linalg.eigvalsh((step + step.T) / 2)
        assert eigenvalues.min() > -1e-12
        assert eigenvalues.max() < 1
        v = np.arange(16.0)
        np.testing.assert_allclose(solver.solve(v), n @ (b + v), rtol=1e-5, atol=1e-7)


def test_solver_with_no_rows_at_all():
    solver = QuadraticSolver.of(np.zeros((0, 3)), np.zeros(0), np.zeros(0), 2.0)
    np.testing.assert_array_equal(solver.step(np.ones(3), np.full(3, 5.0)), np.full(3, 5.0))
    np.testing.assert_array_equal(solver.solve(np.ones(3)), np.full(3, 0.5))


def test_invariant_8_unscheduled_clients_keep_their_model_unless_continual(quadratic, ask):
    federation = Federation(ask, quadratic)
    federation.round = 1
    asleep = federation.ask(1, federation.w_0)
    federation.ask(0, federation.w_0)
    federation.round = 2
    federation.ask(0, np.ones(5))
    np.testing.assert_array_equal(federation.local_model(1), asleep)

    federation = Federation(ask, quadratic)
    federation.round = 1
    federation.ask(1, federation.w_0, continual=True)
    first = federation.local_model(1, continual=True)
    federation.round = 2
    assert not np.array_equal(federation.local_model(1, continual=True), first)


def test_reading_the_local_model_changes_nothing(quadratic, ask):
    federation = Federation(ask, quadratic)
    federation.round = 1
    federation.ask(1, federation.w_0, continual=True)
    before = repr(federation.clients[1].context.state)
    federation.round = 5
    federation.local_model(1, continual=True)
    assert repr(federation.clients[1].context.state) == before


@pytest.mark.parametrize("options", [{}, {"closed_form": False, "batch_size": 3, "lr": 0.05, "seed": 2}])
def test_lazy_catch_up_is_the_eager_sequence(quadratic, ask, options):
    """Scheduled in rounds 1, 3 and 7: asked then, or stepping in every round with the last received model."""
    heard = {1: np.zeros(5), 3: np.ones(5), 7: np.full(5, -1.0)}
    config = {"rho": RHO, "continual": True}
    lazy, eager = (ask(quadratic, 1, **options) for _ in range(2))
    last = heard[1]
    for server_round in range(1, 8):
        last = heard.get(server_round, last)
        eager_reply = eager.train(last, "admm", server_round=server_round, config=config).vector
        if server_round in heard:
            lazy_reply = lazy.train(last, "admm", server_round=server_round, config=config).vector
            np.testing.assert_array_equal(lazy_reply, eager_reply)


def test_continual_first_contact_makes_up_for_every_round(quadratic, ask):
    w_0, w = np.full(5, 0.2), np.ones(5)
    client = ask(quadratic, 1)
    answer = client.train(
        w, "admm", server_round=5, config={"rho": RHO, "continual": True}, records={"initial": w_0}
    )
    model = start(quadratic, 1, RHO, w_0)
    for _ in (2, 3, 4):
        model = exact_step(quadratic, 1, RHO, model, w_0)
    new = exact_step(quadratic, 1, RHO, model, w)
    np.testing.assert_allclose(answer.vector, 2 * new - model, rtol=1e-9)


def test_invariant_11_general_form_with_many_steps_is_the_closed_form(quadratic, ask):
    many = {"closed_form": False, "batch_size": 7, "local_steps": 150, "lr": 0.4}
    for reference in ("telescoped", "fresh"):
        exact, local = Federation(ask, quadratic).run("rerce", rounds=5)
        inexact, models = Federation(ask, quadratic, reference=reference, **many).run("rerce", rounds=5)
        np.testing.assert_allclose(inexact, exact, atol=1e-9)
        np.testing.assert_allclose(models, local, atol=1e-9)
    exact, local = Federation(ask, quadratic).run("dual", rounds=5)
    inexact, models = Federation(ask, quadratic, **many).run("dual", rounds=5)
    np.testing.assert_allclose(inexact, exact, atol=1e-9)
    np.testing.assert_allclose(models, local, atol=1e-9)


def test_telescoped_references_have_the_right_fixed_point_with_loose_solves(quadratic, ask):
    loose = {"closed_form": False, "batch_size": 7, "local_steps": 5, "lr": 0.2}
    telescoped, _ = Federation(ask, quadratic, reference="telescoped", **loose).run("rerce", rounds=150)
    fresh, _ = Federation(ask, quadratic, reference="fresh", **loose).run("rerce", rounds=50)
    assert quadratic.nmsd(telescoped[-1]) < 1e-12
    assert quadratic.nmsd(fresh[-1]) > 1e-6


def test_invariant_12_equal_clients_stay_equal(ask):
    design = Design(np.random.default_rng(0).standard_normal((6, 3)), np.arange(6.0), np.ones(6))
    task = LeastSquaresTask((design,) * 3)
    task.name = "equal"
    _, local = Federation(ask, task).run("rerce")
    np.testing.assert_array_equal(local[0], local[1])
    np.testing.assert_array_equal(local[0], local[2])


def test_local_models_are_asked_of_admm_clients_only(quadratic, ask):
    with pytest.raises(ConfigError, match="admm"):
        ask(quadratic).train(np.zeros(5), "sgd", message_type="query.local_model")


def test_state_of_another_model_is_refused(quadratic, ask):
    client = ask(quadratic)
    client.train(np.zeros(5), "admm", config={"rho": RHO})
    other = ask(Wls(num_clients=2, dimension=9, min_examples=9, max_examples=9))
    other.context = client.context
    with pytest.raises(ConfigError, match="another run"):
        other.train(np.zeros(9), "admm", server_round=2, config={"rho": RHO})


def test_weight_decay_is_no_part_of_a_closed_form(quadratic, ask):
    with pytest.raises(ConfigError, match="weight_decay"):
        ask(quadratic, weight_decay=0.1).train(np.zeros(5), "admm", config={"rho": RHO})
