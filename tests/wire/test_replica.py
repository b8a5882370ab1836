"""Every party's copy of the model, and the rule by which it moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from turnout.wire import ConfigError, LayoutError, ParameterLayout, as_array
from turnout.wire.replica import Ascent, Replica, Search

RULES: tuple[dict[str, Any], ...] = (
    {},
    {"momentum": 0.9, "weight_decay": 0.01},
    {"base": "adam", "beta2": 0.95},
)


def layout(dtype: Any = np.float32, **more: np.ndarray) -> ParameterLayout:
    arrays = {"w": np.zeros((6, 4), dtype), "b": np.zeros(6, dtype), **more}
    return ParameterLayout.from_arrays({name: as_array(array) for name, array in arrays.items()})


@pytest.mark.parametrize("options", RULES, ids=str)
def test_rules_are_those_of_torch_optim(options: dict[str, Any]) -> None:
    rule = Ascent(lr=0.05, **options)
    leaf = torch.ones(7, dtype=torch.float64, requires_grad=True)
    if rule.base == "adam":
        peer: Any = torch.optim.AdamW([leaf], lr=0.05, betas=(0.9, 0.95), weight_decay=0.0)
    else:
        peer = torch.optim.SGD([leaf], lr=0.05, momentum=rule.momentum)
    theta, moments = np.ones(7), [np.zeros(7) for _ in range(rule.num_moments)]
    for step in range(1, 5):
        g = np.linspace(-1, 1, 7) * step
        before = theta
        theta, moments = rule.step(theta, moments, g, step)
        theta = theta + before * rule.lr * rule.weight_decay  # Decoupled, compared without.
        leaf.grad = torch.from_numpy(-g)
        peer.step()
        assert np.allclose(theta, leaf.detach().numpy(), rtol=1e-12)


def test_a_round_without_pairs_changes_nothing() -> None:
    search = Search(seed=3, sigma=0.1, momentum=0.9)
    start = Replica.begin(search, search.source(layout()), np.ones(30, np.float32))
    moved = start.moved(1, np.ones(2, np.float32))
    assert moved.steps == 1
    assert moved.finite
    assert moved.checksum() != start.checksum()
    assert moved.moved(2, np.empty(0, np.float32)) is moved
    assert not Replica(search, start.source, np.full(30, np.inf, np.float32), start.moments).finite


def test_settings_travel_and_their_digest_tells_them_apart() -> None:
    search = Search(seed=3, sigma=0.1, rank=0, noise="rademacher", lr=0.5, momentum=0.9, freeze_1d=True)
    assert Search.from_config(search.to_config()) == search
    assert Search.from_config(search.to_config()).digest == search.digest < 2**24
    assert search.digest != Search(seed=4, sigma=0.1).digest
    with pytest.raises(ConfigError, match="search-sigma"):
        Search.from_config({key: 1 for key in search.to_config() if key != "search-sigma"})
    assert {t.kind for t in search.source(layout()).tensors} == {"full", "frozen"}


def test_models_that_cannot_be_rebuilt_are_refused() -> None:
    search = Search(seed=0, sigma=0.1)
    with pytest.raises(LayoutError, match=r"buffers \(bn.running_mean\)"):
        search.source(layout(**{"bn.running_mean": np.zeros(2, np.float32)}))
    with pytest.raises(LayoutError, match="all tensors float32"):
        search.source(layout(half=np.zeros(2, np.float16)))
