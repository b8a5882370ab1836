"""Impossible hyperparameters: refused when the strategy is made, naming the field and the value."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from typing import Any

import numpy as np
import pytest

from turnout.strategies import (
    EGGROLL,
    MIFA,
    AverageAll,
    BORep,
    BORepLocalUpper,
    DualADMM,
    FedAMD,
    FedAU,
    FedAvg,
    FedDyn,
    FedProx,
    FedStale,
    FedVARP,
    FieldSpaceContinual,
    RerceFed,
    Scaffold,
    ServerECO,
    StreamingStrategy,
    UnbiasedFedAvg,
)
from turnout.wire import ConfigError, methods

NEEDED: dict[type[StreamingStrategy], dict[str, Any]] = {UnbiasedFedAvg: {"participation": 0.5}}
NAN, INF = math.nan, math.inf
EVERY = (
    FedAvg, UnbiasedFedAvg, AverageAll, FedAU, FedStale, FedVARP, MIFA, FedAMD, RerceFed, DualADMM, Scaffold,
    FedProx, FedDyn, BORep, BORepLocalUpper, FieldSpaceContinual, EGGROLL, ServerECO,
)  # fmt: skip
OTHER_DEFAULTS = {EGGROLL: {"server_lr", "client_weights"}}
COMMON: dict[str, tuple[Any, ...]] = {
    "num_clients": (0, -1, 2.5, "5", True, NAN),
    "server_lr": (0, -0.1, NAN, INF, "1", None, True),
    "client_weights": ("equal", None, 1),
    "seed": (-1, 1.5, None, "0"),
    "carried_vectors": ("momentum", ("m", "m"), (1,), ("",), None),
}
BILEVEL: dict[str, tuple[Any, ...]] = {
    "eta": (0, -1.0, NAN, "1"),
    "decay": ("cosine", None),
    "lower_lr": (0, INF),
    "nu": (-0.1, NAN),
    "beta": (1.0, -0.1),
    "interval": (0, 1.5),
    "inner_steps": (-1, None),
    "init_steps": (-1, 2.5),
}
RATES = (
    0, 0.0, -0.1, 1.1, NAN, INF, True, "often", [0.5, 0.0], [0.5, 2.0], [0.5, NAN], {0: 0.0}, {3: 1.5}, ["a"],
    object(),
)  # fmt: skip
OWN: dict[type[StreamingStrategy], dict[str, tuple[Any, ...]]] = {
    FedAvg: {"weighting": ("n", None)},
    ServerECO: {"momentum": (0, 1.0, NAN, "1"), "bits": (1, 9, 4.0), "rounding": ("up", None)},
    BORep: {**BILEVEL, "clip": (0, -1.0, NAN)},
    BORepLocalUpper: BILEVEL,
    FieldSpaceContinual: {
        "merge": ("mean", None),
        "temperature": ("cold", 1),
        "beta": (0, -1.0, NAN),
        "total_rounds": (0, 1.5),
        "kl_weight": (-0.1, INF),
        "prior": ("stream", None),
        "rounds_per_task": (0, "3"),
        "moments": ("send", None),
    },
    EGGROLL: {
        "sigma": (0, NAN),
        "rank": (0, 1.5),
        "pairs": (0, None),
        "mode": ("split",),
        "fitness": ("", "-"),
        "noise": ("uniform",),
        "fitness_shaping": ("signs", ""),
        "base": ("lion",),
        "momentum": (1.0, NAN),
        "clip": (0, INF),
        "checksum_every": (0,),
    },
    UnbiasedFedAvg: {"participation": (*RATES, None, "estimate", {"zero": 0.5})},
    FedAU: {"cutoff": (0, -3, 1.5, NAN, "50")},
    FedStale: {
        "beta": (-0.01, 1.01, NAN, "0.5", None, True),
        "participation": (*RATES, None),
        "empty_round": ("move", None),
        "max_weight": (0.5, 0, NAN, INF, "2"),
        "memory": ("rem", "disk", None, 3, "ram:/data"),
    },
    FedVARP: {"participation": (*RATES, "estimate"), "memory": ("gpu",)},
    MIFA: {"memory": ("fp8",)},
    FedAMD: {
        "anchor_probability": (0.0, 1.0, -0.5, 1.5, NAN, "0.5"),
        "schedule": ("random",),
        "period": (1, 0, 2.5, NAN),
        "memory": ("", "mmap:/no/such/folder"),
    },
    RerceFed: {"rho": (0, -1, NAN, INF, "1"), "clients_per_round": (0, -1, 1.5), "memory": ("mmapp",)},
    DualADMM: {"rho": (0.0, NAN), "clients_per_round": (0,), "form": ("primal",), "memory": ("x",)},
    FedProx: {"proximal_mu": (-0.1, NAN, INF, "0"), "weighting": ("n",)},
    FedDyn: {"dyn_alpha": (0, -1, NAN, INF, None)},
}  # fmt: skip


def cases() -> list[Any]:
    rows = [(kind, field, value) for kind in EVERY for field, values in COMMON.items() for value in values]
    rows += [(k, field, value) for k, own in OWN.items() for field, values in own.items() for value in values]
    return [pytest.param(*row, id=f"{row[0].__name__}-{row[1]}-{i}") for i, row in enumerate(rows)]


@pytest.mark.parametrize(("kind", "field", "value"), cases())
def test_refused_by_name_and_value(kind: type[StreamingStrategy], field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{**NEEDED.get(kind, {}), field: value})
    message = str(caught.value)
    assert field in message
    shown = repr(value)
    if isinstance(value, (list, dict)):  # One entry is at fault, and it is that which is named.
        entries = value.values() if isinstance(value, dict) else value
        bad_key = re.search(r"client id .*got 'zero'", message)
        assert bad_key or any(repr(entry) in message for entry in entries)
    else:
        assert shown in message or str(value).partition(":")[2] in message, message


FITTING = [
    (FedStale, {"beta": 0}, {"beta": 1}),
    (FedStale, {"participation": 1.0}, {"participation": {5: 1e-6, 2**63: 1}}),
    (FedStale, {"participation": np.full(3, 0.5, np.float32)}, {"participation": (0.5, 1)}),
    (FedStale, {"max_weight": 1}, {"max_weight": None}),
    (FedAU, {"cutoff": 1}, {"cutoff": None}),
    (FedAU, {"cutoff": np.int64(7)}, {"num_clients": np.int64(7)}),
    (FedAMD, {"anchor_probability": 0.001}, {"period": 2}),
    (RerceFed, {"clients_per_round": 3, "num_clients": 3}, {"rho": 1e-9}),
    (FedProx, {"proximal_mu": 0}, {"proximal_mu": 5.0}),
]


@pytest.mark.parametrize(("kind", "one", "other"), FITTING)
def test_limits_are_allowed(
    kind: type[StreamingStrategy], one: dict[str, Any], other: dict[str, Any]
) -> None:
    for settings in (one, other):
        strategy = kind(**settings)
        assert all(getattr(strategy, name) is value for name, value in settings.items())


class TestCombinations:
    def test_more_clients_per_round_than_clients(self) -> None:
        for kind in (RerceFed, DualADMM):
            with pytest.raises(ConfigError, match="clients_per_round=5 is more than num_clients=4; lower it"):
                kind(clients_per_round=5, num_clients=4)

    def test_more_clients_than_declared(self) -> None:
        strategy = FedAvg(num_clients=2)
        strategy.prepare(np.zeros(2))
        with pytest.raises(ConfigError, match="num_clients=2, but 3 clients are registered; raise it"):
            strategy.begin_round(1, range(3))

    @pytest.mark.parametrize("kind", [UnbiasedFedAvg, FedVARP, FedStale])
    def test_a_list_of_rates_that_is_too_short(self, kind: type[StreamingStrategy]) -> None:
        with pytest.raises(ConfigError, match="participation gives 2 probabilities for num_clients=3"):
            kind(participation=[0.5, 0.5], num_clients=3)  # type: ignore[call-arg]

    @pytest.mark.parametrize(
        ("kind", "settings"),
        [
            (RerceFed, {"server_lr": 0.5}),
            (DualADMM, {"client_weights": "examples"}),
            (FedDyn, {"server_lr": 0.5}),
            (FedDyn, {"client_weights": "examples"}),
            (Scaffold, {"client_weights": "examples"}),
            (FedAMD, {"client_weights": "examples"}),
            (FedAvg, {"client_weights": "examples"}),
            (BORep, {"server_lr": 0.5}),
            (BORepLocalUpper, {"server_lr": 0.5}),
            (FieldSpaceContinual, {"server_lr": 0.5}),
            (FedVARP, {"client_weights": "examples"}),
        ],
    )
    def test_settings_that_would_be_ignored(
        self, kind: type[StreamingStrategy], settings: dict[str, Any]
    ) -> None:
        (field,) = settings
        with pytest.raises(ConfigError, match=f"has no {field}.*leave {field} at its default"):
            kind(**settings)

    def test_fedvarp_with_rates_may_weigh_by_examples(self) -> None:
        assert FedVARP(participation=0.5, client_weights="examples").client_weights == "examples"


class TestShape:
    def test_the_table_has_every_strategy(self) -> None:
        assert {entry.target for entry in methods("strategy")} == set(EVERY)

    @pytest.mark.parametrize("kind", EVERY)
    def test_fields_are_keyword_only_and_documented_once(self, kind: type[StreamingStrategy]) -> None:
        common = {f.name for f in dataclasses.fields(StreamingStrategy)}
        assert common == {
            "num_clients",
            "server_lr",
            "client_weights",
            "seed",
            "max_update_norm",
            "carried_vectors",
        }
        with pytest.raises(TypeError):
            kind(1)  # type: ignore[call-arg]
        own = [f.name for f in dataclasses.fields(kind) if f.name not in common]
        docs = " ".join(str(base.__doc__) for base in kind.__mro__)
        for name in own:
            assert name in docs, f"{kind.__name__}.{name} is not documented"
        # No subclass repeats them, but for a default of its own.
        assert common & set(inspect.get_annotations(kind)) == OTHER_DEFAULTS.get(kind, set())
