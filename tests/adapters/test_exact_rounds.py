"""Rounds of FedAvg with the methods that are exact in rounds: the new model is the mean of the dense ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array as Sent
from flwr.app import ArrayRecord, Message

from turnout.experiment import Experiment
from turnout.experiment.build import build
from turnout.peft import Adapted
from turnout.wire import keys

METHODS: dict[str, dict[str, Any]] = {
    "snella": {
        "aggregation": "exact-fold", "r": 4, "kernel_scale": 1.0, "target_sparsity": 0.6, "total_step": 12,
    },
    "tera": {},
    "hut": {"freeze_a": True},
    "lora": {},
}  # fmt: skip
ROUNDS = 3


@pytest.mark.parametrize("slug", METHODS)
def test_the_model_of_every_round_is_the_mean_of_the_dense_ones(slug: str) -> None:
    """Weight decay and a falling budget included; of LoRA, beside them, it is not."""
    made = build(
        Experiment.from_dict(
            {
                "task": {"name": "digits", "num_clients": 3},
                "peft": {"name": slug, **METHODS[slug]},
                "client": {"lr": 0.3, "local_steps": 4, "weight_decay": 0.01},
                "strategy": {"name": "fedavg", "weighting": "uniform"},
                "simulation": {"executor": "serial"},
            }
        )
    )
    inner, means, held = made.grid.send_and_receive, [], []

    def deltas(arrays: dict[str, Sent]) -> dict[str, Any]:
        adapted = Adapted.of(made.task.loaded_model(ArrayRecord(arrays)))
        return {name: delta.double().numpy() for name, delta in adapted.delta_weights().items()}

    def watching(messages: Any, **told: Any) -> Any:
        asked: list[Message] = list(messages)
        found = []
        for reply in inner(asked, **told):
            assert not any(name.endswith("folded") for name in reply.content[keys.ARRAYS])
            sent = asked[0].content[keys.ARRAYS]
            found.append(deltas({name: reply.content[keys.ARRAYS].get(name, sent[name]) for name in sent}))
            yield reply
        means.append({name: np.mean([f[name] for f in found], axis=0) for name in found[0]})

    made.grid.send_and_receive = watching  # type: ignore[method-assign]
    made.strategy.start(
        made.grid,
        made.task.initial_arrays(),
        num_rounds=ROUNDS,
        evaluate_fn=lambda now, arrays: held.append(deltas(dict(arrays.items()))),
    )
    errors = [
        np.linalg.norm(new[name] - mean[name]) / np.linalg.norm(mean[name])
        for mean, new in zip(means, held[1:], strict=True)
        for name in mean
        if mean[name].any()
    ]
    assert len(errors) >= ROUNDS
    assert max(errors) > 1e-3 if slug == "lora" else max(errors) < 1e-5
    kept = [int(a.numpy()[0]) for name, a in made.strategy.arrays().items() if name.endswith("num_kept")]
    assert not kept or sum(kept) < sum(delta.size for delta in held[-1].values())
