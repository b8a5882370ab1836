"""The loss-curvature edit's invariants (arXiv 2510.24256): statistics, selection, edit, federation."""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn
from torch.nn.functional import cross_entropy

from turnout.client import client_app
from turnout.optim import collect_curvature, edit_, restore_
from turnout.simulation import LocalGrid
from turnout.strategies.loss_curvature_edit import (
    CurvatureSums,
    Factors,
    edit_arrays,
    edit_weight,
    gather_curvature,
    select_pairs,
)
from turnout.tasks import PlantedLabels
from turnout.wire import ConfigError, ReplyRejected, as_array, view

M, N = 6, 9


def factors(seed: int = 0, rank: int = N) -> Factors:
    rng = np.random.default_rng(seed)
    a, g = rng.standard_normal((rank, N)), rng.standard_normal((M, M))
    return Factors(a.T @ a, g.T @ g)


def weight(seed: int = 5) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((M, N))


class TestEdit:
    def test_the_ends(self) -> None:
        w = weight()
        assert np.array_equal(edit_weight(w, factors(), 1.0).weight, w)
        assert not edit_weight(w, factors(), 0.0).weight.any()
        np.testing.assert_allclose(edit_weight(w, factors(), 1 - 1e-15).weight, w, atol=0.5)

    @pytest.mark.parametrize("rho", [0.3, 0.8, 0.95])
    def test_it_is_an_orthogonal_projection(self, rho: float) -> None:
        w, f = weight(), factors()
        once = edit_weight(w, f, rho).weight
        np.testing.assert_allclose(edit_weight(once, f, rho).weight, once, atol=1e-12)
        np.testing.assert_allclose((w**2).sum(), (once**2).sum() + ((w - once) ** 2).sum())
        assert abs(float((once * (w - once)).sum())) < 1e-10
        assert edit_weight(w, f, rho).energy == pytest.approx((once**2).sum() / (w**2).sum())
        other = weight(6)
        both = edit_weight(w + 2 * other, f, rho).weight
        np.testing.assert_allclose(both, once + 2 * edit_weight(other, f, rho).weight, atol=1e-12)

    def test_scales_of_the_factors_do_not_matter_and_selections_are_nested(self) -> None:
        w, f = weight(), factors()
        scaled = Factors(7.5 * f.inputs, 0.01 * f.gradients)
        np.testing.assert_allclose(
            edit_weight(w, f, 0.8).weight, edit_weight(w, scaled, 0.8).weight, atol=1e-12
        )
        g, a = np.sort(np.linalg.eigvalsh(f.gradients))[::-1], np.sort(np.linalg.eigvalsh(f.inputs))[::-1]
        chosen = [select_pairs(g, a, rho) for rho in (0.1, 0.5, 0.9, 0.99)]
        for smaller, larger in itertools.pairwise(chosen):
            assert (larger | ~smaller).all()
            assert larger.sum() > smaller.sum()

    @pytest.mark.parametrize("rho", [0.05, 0.5, 0.9, 0.999])
    def test_a_heap_over_the_grid_selects_the_same(self, rho: float) -> None:
        """The authors' way: start at the largest pair, take the largest neighbour until the mass is there."""
        rng = np.random.default_rng(3)
        g, a = np.sort(rng.random(M))[::-1], np.sort(rng.random(N))[::-1]
        target, reached, seen = rho * g.sum() * a.sum(), 0.0, {(0, 0)}
        heap, kept = [(-g[0] * a[0], 0, 0)], np.zeros((M, N), bool)
        while heap and reached < target:
            mass, i, j = heapq.heappop(heap)
            kept[i, j], reached = True, reached - mass
            for p, q in ((i + 1, j), (i, j + 1)):
                if p < M and q < N and (p, q) not in seen:
                    seen.add((p, q))
                    heapq.heappush(heap, (-g[p] * a[q], p, q))
        assert np.array_equal(select_pairs(g, a, rho), kept)

    def test_with_g_the_identity_outputs_on_the_data_stay(self) -> None:
        rng = np.random.default_rng(2)
        inputs = rng.standard_normal((4, N))
        f = Factors(inputs.T @ inputs, np.eye(M))
        w = weight()
        edited = edit_weight(w, f, 1 - 1e-9).weight
        np.testing.assert_allclose(edited @ inputs.T, w @ inputs.T, atol=1e-8)
        assert np.abs(edited - w).max() > 0.1

    def test_the_quadratic_cost_is_that_of_the_dropped_pairs(self) -> None:
        w, f = weight(), factors()
        dropped = w - edit_weight(w, f, 0.7).weight
        cost = 0.5 * np.trace(dropped.T @ f.gradients @ dropped @ f.inputs)
        a, u_a = np.linalg.eigh(f.inputs)
        g, u_g = np.linalg.eigh(f.gradients)
        mask = select_pairs(g[::-1], a[::-1], 0.7)[::-1, ::-1]
        c = u_g.T @ w @ u_a
        assert cost == pytest.approx(0.5 * (np.outer(g, a) * c**2 * ~mask).sum(), rel=1e-9)

    def test_ties_are_taken_in_order(self) -> None:
        assert select_pairs(np.ones(2), np.ones(2), 0.5).tolist() == [[True, True], [False, False]]

    @pytest.mark.parametrize("rho", [-0.1, 1.1, float("nan")])
    def test_impossible_shares(self, rho: float) -> None:
        with pytest.raises(ConfigError, match="rho must be from 0 to 1"):
            edit_weight(weight(), factors(), rho)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 7), nn.ReLU(), nn.Linear(7, 3)
    ).double()


def data(count: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 4, 4, generator=rng, dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=rng)


class TestStatistics:
    def test_they_are_sums_over_examples_whatever_the_batches(self) -> None:
        module, (x, y) = network(), data()
        one = collect_curvature(module, [(x, y)], cross_entropy, ["0", "3", "5"])
        parts = [(x[:3], y[:3]), (x[3:4], y[3:4]), (x[4:], y[4:])]
        many = collect_curvature(module, parts, cross_entropy, ["0", "3", "5"])
        for name in one:
            assert one[name].count == many[name].count == 20
            assert torch.allclose(one[name].inputs, many[name].inputs, rtol=1e-10)
            assert torch.allclose(one[name].gradients, many[name].gradients, rtol=1e-10)

    def test_against_gradients_by_hand(self) -> None:
        module, (x, y) = network(), data()
        found = collect_curvature(module, [(x, y)], cross_entropy, ["5"])["5"]
        hidden = module[:5](x).detach()
        assert torch.allclose(found.inputs, hidden.T @ hidden, rtol=1e-10)
        errors = module(x).softmax(1).detach() - nn.functional.one_hot(y, 3)
        assert torch.allclose(found.gradients, errors.T @ errors, rtol=1e-10)
        exact = collect_curvature(module, [(x, y)], cross_entropy, ["5"], labels="expected")["5"]
        p = module(x).softmax(1).detach()
        fisher = torch.diag(p.sum(0)) - p.T @ p
        assert torch.allclose(exact.gradients, fisher, rtol=1e-8, atol=1e-10)

    def test_positions_of_a_convolution_are_samples(self) -> None:
        module, (x, y) = network(), data()
        found = collect_curvature(module, [(x, y)], cross_entropy, ["0"])["0"]
        patches = nn.functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 9)
        assert torch.allclose(found.inputs, patches.T @ patches, rtol=1e-10)
        assert found.gradients.shape == (4, 4)

    def test_sampled_labels_follow_the_generator(self) -> None:
        module, (x, y) = network(), data()

        def drawn(seed: int) -> torch.Tensor:
            rng = torch.Generator().manual_seed(seed)
            found = collect_curvature(module, [(x, y)], cross_entropy, ["5"], labels="sampled", generator=rng)
            return found["5"].gradients

        assert torch.equal(drawn(0), drawn(0))
        assert not torch.equal(drawn(0), drawn(1))

    def test_a_frozen_model_and_a_layer_used_twice(self) -> None:
        torch.manual_seed(0)
        shared = nn.Linear(5, 5).double()
        module = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(5, 3).double())
        x, y = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3
        found = collect_curvature(module, [(x, y)], cross_entropy, ["0"])["0"]
        middle = shared(x).tanh().detach()
        assert torch.allclose(found.inputs, x.T @ x + middle.T @ middle)
        for p in module.parameters():
            p.requires_grad_(False)
        frozen = collect_curvature(module, [(x, y)], cross_entropy, ["0"])["0"]
        assert torch.allclose(frozen.gradients, found.gradients)

    def test_every_part_gets_its_mode_back_even_after_an_error(self) -> None:
        module, (x, y) = network().train(), data()
        module[1].eval()
        for batch in ((x, y), (x[:, :, :2], y)):
            with contextlib.suppress(RuntimeError):
                collect_curvature(module, [batch], cross_entropy, ["3"])
            assert [part.training for part in module] == [i != 1 for i in range(6)]
        assert not module[3]._forward_hooks

    def test_half_precision_is_summed_in_float32(self) -> None:
        module, (x, y) = network().bfloat16(), data(400)
        found = collect_curvature(module, [(x.bfloat16(), y)], cross_entropy, ["3"])["3"]
        hidden = module[:3](x.bfloat16()).detach().double()
        torch.testing.assert_close(found.inputs, hidden.T @ hidden, rtol=1e-4, atol=1e-4)

    def test_curvature_of_another_layer_is_refused_before_anything_changes(self) -> None:
        module, (x, y) = network(), data()
        found = collect_curvature(module, [(x, y)], cross_entropy, ["3", "5"])
        before = module[3].weight.detach().clone()
        nothing = torch.full((3, 3), float("nan"), dtype=torch.float64)
        for wrong, words in (
            ({"5": found["3"]}, "its weight needs"),
            ({"9": found["5"]}, "no such layer"),
            ({"5": dataclasses.replace(found["5"], gradients=nothing)}, "is not finite"),
        ):
            with pytest.raises(ConfigError, match=words):
                edit_(module, {"3": found["3"], **wrong}, 0.9)
            assert torch.equal(module[3].weight, before)

    def test_layers_that_are_not_there(self) -> None:
        with pytest.raises(ConfigError, match="'4' cannot be edited; this model has 0, 3, 5"):
            collect_curvature(network(), [data()], cross_entropy, ["4"])

    def test_the_torch_edit_is_the_servers_and_can_be_undone(self) -> None:
        module, (x, y) = network(), data()
        before = {name: p.detach().clone() for name, p in module.state_dict().items()}
        found = collect_curvature(module, [(x, y)], cross_entropy, ["0", "3"])
        originals = edit_(module, found, 0.9)
        for name in ("0", "3"):
            f = Factors(found[name].inputs.numpy(), found[name].gradients.numpy())
            matrix = before[f"{name}.weight"].reshape(len(before[f"{name}.weight"]), -1).numpy()
            expected = edit_weight(matrix, f, 0.9).weight
            got = module.get_submodule(name).weight.detach().reshape(expected.shape).numpy()
            np.testing.assert_allclose(got, expected, atol=1e-9)
            assert np.abs(got - matrix).max() > 1e-3
        restore_(module, originals)
        assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())


def planted(num_clients: int, **options: Any) -> PlantedLabels:
    return PlantedLabels(num_clients=num_clients, train_examples=100, width=16, **options)


def gathered(task: PlantedLabels, **options: Any) -> tuple[CurvatureSums, dict[int, str]]:
    grid = LocalGrid(client_app(task), task.num_clients)
    return gather_curvature(grid, task.initial_arrays(), ["3"], **options)


class TestFederation:
    def test_any_partition_gives_the_pooled_factors(self) -> None:
        pooled = gathered(planted(1))[0].factors()["3"]
        for clients, alpha in ((3, 0.1), (7, 5.0)):
            sums, missing = gathered(planted(clients, partition="dirichlet", alpha=alpha))
            assert missing == {}
            assert (sums.clients, sums.examples) == (clients, 100)
            found = sums.factors()["3"]
            np.testing.assert_allclose(found.inputs, pooled.inputs, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(found.gradients, pooled.gradients, rtol=1e-5, atol=1e-7)

    def test_the_order_of_replies_does_not_matter_to_the_bit(self) -> None:
        rng = np.random.default_rng(0)
        replies = [self.reply(rng, 10.0**k) for k in (-3, 0, 2, 3)]
        results = []
        for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
            sums = CurvatureSums({"l": (2, 3)})
            for index in order:
                sums.fold(replies[index], index + 1)
            f = sums.factors()["l"]
            results.append((f.inputs.tobytes(), f.gradients.tobytes()))
        assert results[0] == results[1]

    @staticmethod
    def reply(rng: np.random.Generator, scale: float = 1.0, **replaced: Any) -> ArrayRecord:
        a, g = scale * rng.standard_normal((5, 3)), scale * rng.standard_normal((5, 2))
        arrays = {"A": (a.T @ a)[np.triu_indices(3)], "G": (g.T @ g)[np.triu_indices(2)], **replaced}
        record = ArrayRecord()
        for part, array in arrays.items():
            if array is not None:
                record[f"l/{part}"] = as_array(np.asarray(array, np.float32))
        return record

    @pytest.mark.parametrize(
        ("replaced", "reason"),
        [
            ({"G": None}, "wrong-layout"),
            ({"A": np.ones(5)}, "wrong-layout"),
            ({"A": np.array([1, 0, 0, 1, 0, np.nan])}, "non-finite"),
            ({"A": np.array([1, 0, 0, 1e35, 0, 1])}, "non-finite"),
            ({"G": np.array([-1.0, 0, 1])}, "bad-metric"),
        ],
    )
    def test_hostile_statistics_are_refused_whole(self, replaced: dict[str, Any], reason: str) -> None:
        sums = CurvatureSums({"l": (2, 3)})
        rng = np.random.default_rng(0)
        sums.fold(self.reply(rng), 5)
        before = sums.factors()["l"]
        with pytest.raises(ReplyRejected) as caught:
            sums.fold(self.reply(rng, **replaced), 5)
        assert caught.value.reason == reason
        with pytest.raises(ReplyRejected):
            sums.fold(self.reply(rng), 0)
        assert sums.examples == 5
        assert np.array_equal(sums.factors()["l"].inputs, before.inputs)

    def test_balanced_clients_count_alike(self) -> None:
        rng = np.random.default_rng(0)
        loud, quiet = self.reply(rng, 100.0), self.reply(rng, 0.1)
        sums = CurvatureSums({"l": (2, 3)}, "balanced")
        sums.fold(loud, 1000)
        sums.fold(quiet, 1)
        expected = np.zeros((2, 2))
        for record in (loud, quiet):
            whole = np.zeros((2, 2))
            whole[np.triu_indices(2)] = view(record["l/G"])
            whole = whole + np.triu(whole, 1).T
            expected += whole / np.trace(whole) / 2
        np.testing.assert_allclose(sums.factors()["l"].gradients, expected, rtol=1e-6)

    def test_clients_that_fail_are_named_and_the_others_count(self) -> None:
        task = planted(3)
        broken = task.client_data
        task.client_data = lambda client: 1 / 0 if client == 1 else broken(client)  # type: ignore
        sums, missing = gathered(task)
        assert list(missing) == [1]
        assert "ZeroDivisionError" in missing[1]
        assert sums.clients == 2

    def test_nobody_and_nothing_to_edit(self) -> None:
        with pytest.raises(ConfigError, match="no client has sent"):
            CurvatureSums({"l": (2, 3)}).factors()
        task = planted(1)
        with pytest.raises(ConfigError, match="'9' has no weight matrix; this model has 1, 3, 5"):
            gather_curvature(LocalGrid(client_app(task), 1), task.initial_arrays(), ["9"])


def test_an_edit_makes_a_model_forget_what_it_memorised() -> None:
    """300 examples, 30 of them wrong, memorised in one place; statistics from five clients."""
    options = {"train_examples": 300, "width": 128}
    task = PlantedLabels(num_clients=1, **options)
    app = client_app(task, optimizer="adam", lr=0.002, local_epochs=25, batch_size=64)
    from turnout.strategies import FedAvg

    strategy = FedAvg()
    strategy.start(LocalGrid(app, 1), task.initial_arrays(), num_rounds=3)
    before = task.evaluate(strategy.arrays())
    assert before["memorised"] > 0.9
    clients = PlantedLabels(num_clients=5, **options)
    sums, _ = gather_curvature(LocalGrid(client_app(clients), 5), strategy.arrays(), ["3"])
    edited, layers = edit_arrays(strategy.arrays(), sums.factors(), 0.97)
    after = task.evaluate(edited)
    assert layers["3"].kept < 0.1
    assert after["memorised"] < before["memorised"] - 0.4
    assert after["recovered"] > before["recovered"] + 0.3
    assert after["accuracy"] > before["accuracy"] - 0.12
    assert np.array_equal(view(edited["5.weight"]), view(strategy.arrays()["5.weight"]))
