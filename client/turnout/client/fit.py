"""Whether clients' settings fit the local updates that a strategy asks for: told before anybody trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from turnout.client.local_updates import FULL_PRECISION
from turnout.client.options import TrainOptions
from turnout.tasks.bilevel import BilevelTask
from turnout.wire.errors import ConfigError

# Defined by steps of plain SGD: see `Work.require_plain_sgd`.
_PLAIN_SGD: Final = frozenset({"miner", "scaffold"})
# These take no step with the client's optimizer: they bring their own, or none.
_NO_OPTIMIZER: Final = frozenset({"bo-rep", "bo-rep-local-upper", "eggroll", "field-space"})

# These reply the received model as the client's optimizer trained it.
_TRAINED: Final = frozenset({"sgd", "prox", "dyn"})
# Which level of a bilevel task must be the shared one, and a task of that kind.
_SHARED_LEVEL: Final = {
    "bo-rep": ("upper", "hyper-representation"),
    "bo-rep-local-upper": ("lower", "hyper-cleaning"),
}


def check_task(strategy: str, local_updates: Iterable[str], task: str, target: object) -> None:
    """Raise `ConfigError` when clients of the task ``target``, called ``task``, cannot do what is asked."""
    bilevel = isinstance(target, type) and issubclass(target, BilevelTask)
    shared = getattr(target, "shared", None) if bilevel else None
    asked = [_SHARED_LEVEL[name] for name in local_updates if name in _SHARED_LEVEL]
    for level, example in asked:
        if shared != level:
            raise ConfigError(
                f"name={task!r}: strategy {strategy!r} needs a bilevel task that shares its {level} level; "
                f"use task.name={example!r}, or a BilevelTask of your own."
            )
    if shared == "upper" and not asked:
        raise ConfigError(
            f"name={task!r} has no loss without its clients' own level, which strategy {strategy!r} does not "
            "train; use strategy.name='bo-rep'."
        )


def check_fit(strategy: str, local_updates: Iterable[str], options: TrainOptions) -> None:
    """Raise `ConfigError` when clients with ``options`` cannot do what ``strategy`` asks of them."""
    for name in local_updates:
        asked = f"strategy {strategy!r} asks for the local update {name!r}"
        if name in FULL_PRECISION and options.precision != "float32":
            raise ConfigError(
                f"precision={options.precision!r} is not possible: {asked}, which works in float32; use "
                "precision='float32'."
            )
        if options.reply == "coded" and name not in _TRAINED:
            raise ConfigError(
                f"reply='coded' is not possible: {asked}, which replies other things than the model that the "
                "optimizer trained; use reply='dense'."
            )
        if options.plain_sgd or name not in _PLAIN_SGD | _NO_OPTIMIZER:
            continue
        field, value, plain = "momentum", repr(options.momentum), "0"
        if options.optimizer.lower() != "sgd":
            field, value, plain = "optimizer", repr(options.optimizer), "'sgd'"
        elif options.optimizer_state != "reset":
            field, value, plain = "optimizer_state", repr(options.optimizer_state), "'reset'"
        why = "is defined by plain SGD steps" if name in _PLAIN_SGD else "takes no step with the optimizer"
        raise ConfigError(f"{field}={value} is not possible: {asked}, which {why}; use {field}={plain}.")
