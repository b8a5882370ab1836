"""Dense averaging of low-rank adapters on the server: exact, best, and near the factors that were there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from turnout.experiment import Experiment
from turnout.experiment.build import build
from turnout.strategies.svd_factors import SvdFactors
from turnout.wire import ConfigError, ParameterLayout, as_array, load_checkpoint, save_checkpoint, view

D_OUT, D_IN, R, SCALE = 9, 12, 3, 2.0
Array = NDArray[np.floating[Any]]


def record(rng: np.random.Generator) -> dict[str, Array]:
    return {
        "layer.lora_A": rng.standard_normal((R, D_IN)).astype(np.float32),
        "layer.lora_B": rng.standard_normal((D_OUT, R)).astype(np.float32),
        "head.weight": rng.standard_normal((2, 4)).astype(np.float32),
    }


def bound(arrays: dict[str, Array]) -> tuple[SvdFactors, ParameterLayout, Array]:
    layout = ParameterLayout.from_arrays({name: as_array(a) for name, a in arrays.items()})
    vector = layout.flatten({name: as_array(a) for name, a in arrays.items()})
    factors = SvdFactors([("lora_A", "lora_B")], SCALE)
    factors.bind(layout, vector)
    return factors, layout, vector


def product(arrays: dict[str, Array]) -> Array:
    made: Array = SCALE * (arrays["layer.lora_B"] @ arrays["layer.lora_A"])
    return made


def test_inside_is_the_dense_update_and_outside_its_best_approximation() -> None:
    rng = np.random.default_rng(0)
    arrays = record(rng)
    factors, layout, vector = bound(arrays)
    inside = factors.inside(vector)
    assert inside.shape == (D_OUT * D_IN + 8,)
    np.testing.assert_allclose(inside[: D_OUT * D_IN].reshape(D_OUT, D_IN), product(arrays), rtol=1e-5)
    np.testing.assert_array_equal(inside[D_OUT * D_IN :], arrays["head.weight"].reshape(-1))
    full = inside + rng.standard_normal(inside.shape).astype(np.float32)
    dense = full[: D_OUT * D_IN].reshape(D_OUT, D_IN)
    u, s, vh = np.linalg.svd(dense)
    best = (u[:, :R] * s[:R]) @ vh[:R]
    back = product(layout.split(factors.outside(full)))
    np.testing.assert_allclose(back, best, atol=1e-5)


def test_factors_that_need_no_change_stay_as_they_are() -> None:
    arrays = record(np.random.default_rng(1))
    factors, _, vector = bound(arrays)
    np.testing.assert_array_equal(factors.outside(factors.inside(vector)), vector)
    nearly = np.float32(1 + 1e-6) * factors.inside(vector)  # Found again by decomposition.
    np.testing.assert_allclose(factors.outside(nearly), vector, atol=3e-5)
    arrays["layer.lora_B"][:] = 0  # As LoRA starts: no update, but a frame that must not be lost.
    factors, _layout, vector = bound(arrays)
    nearly = factors.inside(vector)
    nearly[-1] += np.float32(1e-6)
    np.testing.assert_allclose(factors.outside(nearly), vector, atol=3e-6)


@pytest.mark.parametrize("rank", [1, 2])
def test_an_update_of_lower_rank_keeps_the_rest_of_a(rank: int) -> None:
    rng = np.random.default_rng(2)
    arrays = record(rng)
    arrays["layer.lora_B"][:, rank:] = 0
    factors, layout, vector = bound(arrays)
    nearly = factors.inside(vector)
    nearly[-1] += np.float32(1e-6)
    out = layout.split(factors.outside(nearly))
    np.testing.assert_allclose(product(out), product(arrays), atol=1e-5)
    assert np.linalg.matrix_rank(out["layer.lora_A"]) == R  # No direction is dead.
    np.testing.assert_allclose(out["layer.lora_A"], arrays["layer.lora_A"], atol=1e-4)


def test_a_gradient_comes_back_as_the_same_motion_of_the_update() -> None:
    rng = np.random.default_rng(3)
    arrays, gradient = record(rng), record(rng)
    factors, layout, _vector = bound(arrays)
    flat = layout.flatten({name: as_array(a) for name, a in gradient.items()})
    inside = factors.gradient_inside(flat)
    a, b = arrays["layer.lora_A"], arrays["layer.lora_B"]
    motion = SCALE * (gradient["layer.lora_B"] @ a + b @ gradient["layer.lora_A"])
    np.testing.assert_allclose(inside[: D_OUT * D_IN].reshape(D_OUT, D_IN), motion, atol=1e-5)
    back = factors.gradient_outside(inside)
    np.testing.assert_allclose(factors.gradient_inside(back), inside, atol=1e-4)
    assert np.linalg.norm(back) <= np.linalg.norm(flat) * (1 + 1e-5)  # The least that does it.


def test_a_gradient_at_b_zero_moves_b_only() -> None:
    rng = np.random.default_rng(4)
    arrays, gradient = record(rng), record(rng)
    arrays["layer.lora_B"][:] = 0
    gradient["layer.lora_A"][:] = 0
    factors, layout, _ = bound(arrays)
    flat = layout.flatten({name: as_array(a) for name, a in gradient.items()})
    np.testing.assert_allclose(factors.gradient_outside(factors.gradient_inside(flat)), flat, atol=1e-4)


def test_a_model_without_factors_is_refused() -> None:
    layout = ParameterLayout.from_arrays({"w": as_array(np.zeros(3, np.float32))})
    with pytest.raises(ConfigError, match="lora_A"):
        SvdFactors([("lora_A", "lora_B")], 1.0).bind(layout, np.zeros(3, np.float32))


def federation(strategy: dict[str, Any], **peft: Any) -> Any:
    return build(
        Experiment.from_dict(
            {
                "task": {"name": "digits", "num_clients": 4},
                "peft": {"name": "lora", "r": 2, "target_modules": ["1"], "modules_to_save": ["3"], **peft},
                "client": {"lr": 0.3, "local_steps": 3},
                "strategy": strategy,
                "simulation": {"executor": "serial"},
            }
        )
    )


def test_one_round_of_fedavg_is_the_best_approximation_of_the_mean_dense_update() -> None:
    made = federation({"name": "fedavg"}, aggregation="exact-svd")
    initial = made.task.initial_arrays()
    layout = ParameterLayout.from_arrays(initial)
    scale = made.task.config.scale
    replies = []

    class Watch(type(made.grid)):  # type: ignore[misc]
        def send_and_receive(self, messages: Any, **more: Any) -> Any:
            for reply in super().send_and_receive(messages, **more):
                split = layout.split(layout.flatten(reply.content["arrays"]))
                replies.append(
                    (split["1.lora_B"] @ split["1.lora_A"], reply.content["metrics"]["num-examples"])
                )
                yield reply

    made.grid.__class__ = Watch
    result = made.strategy.start(made.grid, initial, num_rounds=1)
    weights = np.array([n for _, n in replies], dtype=float)
    mean = (
        scale
        * sum(w * d.astype(np.float64) for w, (d, _) in zip(weights, replies, strict=True))
        / weights.sum()
    )
    u, s, vh = np.linalg.svd(mean)
    after = layout.split(layout.flatten(result.arrays))
    dense = scale * (after["1.lora_B"] @ after["1.lora_A"])
    np.testing.assert_allclose(dense, (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5)
    assert s[2] > 1e-4, "the mean should need more than rank 2, or this shows nothing"


def test_a_strategy_without_updates_is_refused() -> None:
    with pytest.raises(ConfigError, match="eggroll's clients send none"):
        federation({"name": "eggroll"}, aggregation="exact-svd")


STRATEGIES: list[dict[str, Any]] = [
    {"name": "fedstale", "participation": "estimate"},
    {"name": "fedau"},
    {"name": "fedamd", "anchor_probability": 0.5},
    {"name": "rerce-fed", "rho": 0.1},
    {"name": "rerce-fed", "rho": 0.1, "continual": False},
    {"name": "dual-admm", "rho": 0.3},
    {"name": "scaffold"},
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_every_strategy_learns_and_resumes_with_it(strategy: dict[str, Any], tmp_path: Any) -> None:
    made = federation(strategy, aggregation="exact-svd")
    initial = made.task.initial_arrays()
    before = made.task.evaluate(initial)["loss"]
    saved: dict[int, dict[str, Any]] = {}

    from turnout.strategies import Callback

    class Save(Callback):
        def on_round_end(self, report: Any) -> None:
            save_checkpoint(tmp_path / "checkpoint", report.checkpoint())
            saved[report.server_round] = load_checkpoint(tmp_path / "checkpoint")

    result = made.strategy.start(made.grid, initial, num_rounds=6, callbacks=[Save()])
    assert made.task.evaluate(result.arrays)["loss"] < before
    if made.strategy.folds_cohorts:
        raise AssertionError("cohorts are folded in the clients' coordinates")
    again = federation(strategy, aggregation="exact-svd")
    resumed = again.strategy.start(again.grid, initial, num_rounds=6, resume_from=saved[3])
    for name, array in result.arrays.items():
        np.testing.assert_array_equal(view(array), view(resumed.arrays[name]))
