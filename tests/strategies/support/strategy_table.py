"""The one list of strategies that every behaviour is tested on, and the federation they are tested in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import reference_rules as rules
from flwr.app import ArrayRecord
from scripted_grid import Client, SyntheticClient

from turnout.strategies import (
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
from turnout.wire import as_array

# Flower draws node ids from all of 64 bits; the last client names no id, so its node's is its own.
NODES = (
    0xFFFF_FFFF_FFFF_FFFE,
    17,
    0x8000_0000_0000_0001,
    0x7FFF_FFFF_FFFF_FFFF,
    2**40 + 5,
    3,
    0xC0FF_EE00_DEAD_BEEF,
)
KEYS = (4, 0, 900_000_000_000, 2, -1, 5, NODES[-1])
EXAMPLES = (10, 1, 250, 33, 8, 100, 57)
P = dict(zip(KEYS, (0.9, 0.35, 1.0, 0.5, 0.25, 0.8, 0.6), strict=True))


@dataclass(frozen=True, eq=False)
class Row:
    """One strategy with one set of hyperparameters, and the rule from its paper in plain float64."""

    name: str
    make: Callable[..., StreamingStrategy]
    rule: Callable[[], rules.Rule]
    options: Mapping[str, Any]

    def strategy(self, **more: Any) -> StreamingStrategy:
        return self.make(**{**self.options, **more})

    def __str__(self) -> str:
        return self.name


Rule = Callable[[], rules.Rule]


def _row(name: str, make: Callable[..., StreamingStrategy], rule: Rule, **options: Any) -> Row:
    return Row(name, make, rule, options)


LR = 0.7
U, E = "uniform", "examples"
BY_EXAMPLES = {"client_weights": E}
ROWS = (
    _row("fedavg", FedAvg, lambda: rules.FedAvg(LR, E), server_lr=LR),
    _row("fedavg-uniform", FedAvg, lambda: rules.FedAvg(1.0, U), weighting=U),
    _row("fedprox", FedProx, lambda: rules.FedAvg(LR, E), server_lr=LR, proximal_mu=0.3),
    _row("average-all", AverageAll, lambda: rules.Weighted(LR, U), server_lr=LR),
    _row("average-all-examples", AverageAll, lambda: rules.Weighted(1.0, E), **BY_EXAMPLES),
    _row("unbiased-fedavg", UnbiasedFedAvg, lambda: rules.Weighted(LR, U, P), server_lr=LR, participation=P),
    _row(
        "unbiased-fedavg-examples",
        UnbiasedFedAvg,
        lambda: rules.Weighted(1.0, E, P),
        participation=P,
        **BY_EXAMPLES,
    ),
    _row("fedau", FedAU, lambda: rules.FedAU(LR, U, None), server_lr=LR, cutoff=None),
    _row("fedau-cutoff", FedAU, lambda: rules.FedAU(1.0, E, 3), cutoff=3, **BY_EXAMPLES),
    _row("fedstale", FedStale, lambda: rules.FedStale(LR, U, 0.5, P), server_lr=LR, participation=P),
    _row(
        "fedstale-examples",
        FedStale,
        lambda: rules.FedStale(1.0, E, 0.3, P, largest=2.0),
        beta=0.3,
        participation=P,
        max_weight=2.0,
        **BY_EXAMPLES,
    ),
    _row("fedstale-estimate", FedStale, lambda: rules.FedStale(1.0, U, 0.8, None), beta=0.8),
    _row(
        "fedstale-skip",
        FedStale,
        lambda: rules.FedStale(1.0, U, 0.5, P, skip=True),
        participation=P,
        empty_round="skip",
    ),
    _row("fedstale-mmap", FedStale, lambda: rules.FedStale(1.0, U, 0.5, P), participation=P, memory="mmap"),
    _row("fedstale-fp16", FedStale, lambda: rules.FedStale(1.0, U, 0.5, P), participation=P, memory="fp16"),
    _row("fedvarp", FedVARP, lambda: rules.FedVARP(LR), server_lr=LR),
    _row("fedvarp-heterogeneous", FedVARP, lambda: rules.FedStale(1.0, U, 1.0, P), participation=P),
    _row("mifa", MIFA, lambda: rules.MIFA(LR, U), server_lr=LR),
    _row("mifa-examples-mmap", MIFA, lambda: rules.MIFA(1.0, E), memory="mmap", **BY_EXAMPLES),
    _row("fedamd", FedAMD, lambda: rules.FedAMD(LR), server_lr=LR, anchor_probability=0.4),
    _row(
        "fedamd-sequential",
        FedAMD,
        lambda: rules.FedAMD(1.0),
        schedule="sequential",
        period=3,
        memory="fp16",
    ),
    _row("fedamd-warm", FedAMD, lambda: rules.FedAMD(1.0), cold_start=False),
    _row("rerce-fed", RerceFed, lambda: rules.Continual(), clients_per_round=4),
    _row("rerce-fed-scheduled", RerceFed, lambda: rules.Scheduled(), clients_per_round=4, continual=False),
    _row("dual-admm", DualADMM, lambda: rules.Slots(), memory="mmap"),
    _row(
        "dual-admm-two-copies",
        DualADMM,
        lambda: rules.Participants(),
        form="two-copies",
        clients_per_round=3,
    ),
    _row("scaffold", Scaffold, lambda: rules.Scaffold(LR), server_lr=LR),
    _row("feddyn", FedDyn, lambda: rules.FedDyn(0.3), dyn_alpha=0.3),
    _row("eco", ServerECO, lambda: rules.ServerECO(LR, 8), server_lr=LR, rounding="rtn"),
    _row("eco-stochastic", ServerECO, lambda: rules.ServerECO(1.0, 4, 0.5, True), bits=4, momentum=0.5),
    _row("bo-rep", BORep, lambda: rules.BORep(0.3), eta=0.3),
    _row("bo-rep-examples", BORep, lambda: rules.BORep(0.3, E), eta=0.3, **BY_EXAMPLES),
    _row("bo-rep-plain", BORep, lambda: rules.BORep(0.3, normalize=False), eta=0.3, normalize=False),
    _row("bo-rep-local-upper", BORepLocalUpper, lambda: rules.BORepLocalUpper(), interval=1),
    _row("field-space-continual", FieldSpaceContinual, lambda: rules.FedAvg(1.0, E), prior="task"),
)
# fp16 rounds what is remembered to 11 bits.
TOLERANCE = {"fedstale-fp16": 2e-3, "fedamd-sequential": 2e-3}


def federation(**options: Any) -> dict[int, Client]:
    """The clients by node."""
    return {
        node: SyntheticClient(None if i == 6 else KEYS[i], number=i, examples=EXAMPLES[i], **options)
        for i, node in enumerate(NODES)
    }


def initial(seed: int = 0, *, width: int = 4, buffers: bool = True) -> ArrayRecord:
    """A model of two tensors and a scalar, with batch-norm statistics beside them."""
    rng = np.random.default_rng([99, seed])
    arrays = {
        "fc.weight": rng.standard_normal((width, 5)),
        "fc.bias": rng.standard_normal(width),
        "scale": rng.standard_normal(()),
    }
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = as_array(np.asarray(array, np.float32))
    if buffers:
        record["bn.running_mean"] = as_array(np.full(3, 0.25, np.float32))
        record["bn.running_var"] = as_array(np.array(1 / 3, np.float32))
        record["bn.num_batches_tracked"] = as_array(np.array(5))
    return record
