"""Dense averaging of AdaLoRA on the server: the best triplets, orthonormal, each in the place of its like."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from turnout.allocation import widened
from turnout.experiment import Experiment
from turnout.experiment.build import build
from turnout.strategies.svd_triplets import SvdTriplets
from turnout.wire import ParameterLayout, as_array, keys, view

D_OUT, D_IN, R, SCALE = 9, 12, 4, 2.0
Array = NDArray[np.floating[Any]]


def record(rng: np.random.Generator, std: float = 1.0) -> dict[str, Array]:
    return {
        "layer.lora_A": (std * rng.standard_normal((R, D_IN))).astype(np.float32),
        "layer.lora_B": (std * rng.standard_normal((D_OUT, R))).astype(np.float32),
        "layer.lora_E": rng.standard_normal((R, 1)).astype(np.float32),
        "head.weight": rng.standard_normal((2, 4)).astype(np.float32),
    }


def bound(arrays: dict[str, Array]) -> tuple[SvdTriplets, ParameterLayout, Array]:
    layout = ParameterLayout.from_arrays({name: as_array(a) for name, a in arrays.items()})
    vector = layout.flatten({name: as_array(a) for name, a in arrays.items()})
    triplets = SvdTriplets([("lora_A", "lora_B", "lora_E")], SCALE)
    triplets.bind(layout, vector)
    return triplets, layout, vector


def parts(layout: ParameterLayout, vector: Array, path: str = "layer") -> tuple[Array, Array, Array]:
    split = layout.split(vector)
    return split[f"{path}.lora_A"], split[f"{path}.lora_B"], split[f"{path}.lora_E"]


def best(dense: Array, rank: int) -> Array:
    u, s, vh = np.linalg.svd(dense.astype(np.float64), full_matrices=False)
    made: Array = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return made


def test_outside_are_orthonormal_triplets_of_the_best_approximation() -> None:
    rng = np.random.default_rng(0)
    triplets, layout, vector = bound(record(rng))
    full = triplets.inside(vector)
    full += 0.5 * rng.standard_normal(full.shape).astype(np.float32)
    a, b, e = parts(layout, triplets.outside(full))
    dense = full[: D_OUT * D_IN].reshape(D_OUT, D_IN)
    np.testing.assert_allclose(SCALE * b @ (e * a), best(dense, R), atol=1e-5)
    np.testing.assert_allclose(a @ a.T, np.eye(R), atol=1e-6)
    np.testing.assert_allclose(b.T @ b, np.eye(R), atol=1e-6)


def test_triplets_keep_their_places_and_signs() -> None:
    rng = np.random.default_rng(1)
    triplets, _, vector = bound(record(rng))
    full = triplets.inside(vector)
    full += 0.5 * rng.standard_normal(full.shape).astype(np.float32)
    sent = triplets.outside(full)
    triplets.sent(sent)
    nearly = triplets.inside(sent) + 1e-4 * rng.standard_normal(full.shape).astype(np.float32)
    np.testing.assert_allclose(triplets.outside(nearly), sent, atol=1e-3)


def test_where_there_is_no_update_there_is_still_a_way_to_one() -> None:
    arrays = record(np.random.default_rng(2), std=0.02)
    arrays["layer.lora_E"][:] = 0  # As AdaLoRA starts.
    triplets, layout, vector = bound(arrays)
    np.testing.assert_array_equal(triplets.outside(triplets.inside(vector)), vector)
    two = triplets.inside(vector)
    two[: D_OUT * D_IN] += 1e3 * (arrays["layer.lora_B"][:, :2] @ arrays["layer.lora_A"][:2]).reshape(-1)
    a, b, e = parts(layout, triplets.outside(two))
    assert (e[:, 0] != 0).tolist() == [True, True, False, False]
    np.testing.assert_allclose(a @ a.T, np.eye(R), atol=1e-6)
    np.testing.assert_allclose(b.T @ b, np.eye(R), atol=1e-6)


def test_a_gradient_comes_back_as_the_same_motion_of_the_update() -> None:
    rng = np.random.default_rng(3)
    arrays, gradient = record(rng), record(rng)
    triplets, layout, _ = bound(arrays)
    flat = layout.flatten({name: as_array(a) for name, a in gradient.items()})
    inside = triplets.gradient_inside(flat)
    # The derivative of the update, by differences in float64.
    exact = SvdTriplets([("lora_A", "lora_B", "lora_E")], SCALE)
    wide = {name: a.astype(np.float64) for name, a in arrays.items()}
    doubles = ParameterLayout.from_arrays({name: as_array(a) for name, a in wide.items()})
    at = doubles.flatten({name: as_array(a) for name, a in wide.items()})
    exact.bind(doubles, at)
    moved = (exact.inside(at + 1e-6 * flat) - exact.inside(at - 1e-6 * flat)) / 2e-6
    np.testing.assert_allclose(inside, moved, atol=1e-4)
    back = triplets.gradient_outside(inside)
    np.testing.assert_allclose(triplets.gradient_inside(back), inside, atol=1e-4)
    assert np.linalg.norm(back) <= np.linalg.norm(flat) * (1 + 1e-5)  # The least that does it.


def test_the_error_of_a_round_is_the_tail_of_the_mean_update() -> None:
    """Invariant 8 of the method, before and after the ranks are fixed."""
    made = build(
        Experiment.from_dict(
            {
                "run": {"seed": 2},
                "task": {"name": "digits", "num_clients": 3},
                "peft": {
                    "name": "adalora", "aggregation": "exact-svd", "init_r": 4, "target_r": 1, "tinit": 6,
                    "tfinal": 4, "total_step": 16, "init_std": 0.2,
                },
                "client": {"lr": 0.5, "local_steps": 4},
                "strategy": {"name": "fedavg", "weighting": "uniform"},
                "simulation": {"executor": "serial"},
            }
        )
    )  # fmt: skip
    strategy, scale, inner = made.strategy, made.task.config.scale, made.grid.send_and_receive
    means: dict[str, Array] = {}
    errors: list[dict[str, tuple[float, float, int]]] = []

    def watching(messages: Any, **told: Any) -> Any:
        means.clear()
        for reply in inner(messages, **told):
            whole = strategy.arrays()
            record = widened(reply.content[keys.ARRAYS], strategy._kept(), lambda name: view(whole[name]))
            full = {**whole, **record}
            for path in ("1", "3"):
                a, b, e = parts(strategy.layout, strategy.layout.flatten(full), path)
                means[path] = means.get(path, 0.0) + scale * b.astype(np.float64) @ (e * a) / 3
            yield reply

    def note(server_round: int, arrays: ArrayRecord) -> None:
        errors.append({})
        for path, mean in means.items():
            a, b, e = parts(strategy.layout, strategy.layout.flatten(arrays), path)
            rank = int((e != 0).sum())
            tail = np.linalg.svd(mean, compute_uv=False)[rank:]
            error = np.linalg.norm(mean - scale * b @ (e * a))
            errors[-1][path] = float(error), float(np.linalg.norm(tail)), rank

    made.grid.send_and_receive = watching
    strategy.start(made.grid, made.task.initial_arrays(), num_rounds=4, evaluate_fn=note)
    assert {report.outcome for report in strategy.reports} == {"ok"}
    for layers in errors:
        for error, tail, _ in layers.values():
            np.testing.assert_allclose(error, tail, atol=2e-6)
    assert max(tail for layers in errors for _, tail, _ in layers.values()) > 1e-3
    budget = strategy.allocator.schedule(2)
    ranks = [sum(rank for _, _, rank in layers.values()) for layers in errors if layers]
    assert ranks == [budget.budget(4 * n) for n in range(1, 5)]
