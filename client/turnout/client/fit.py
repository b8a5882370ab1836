"""Whether clients' settings fit the local updates that a strategy asks for: told before anybody trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from turnout.client.local_updates import FULL_PRECISION
from turnout.client.options import TrainOptions
from turnout.wire.errors import ConfigError

# Defined by steps of plain SGD: see `Work.require_plain_sgd`.
_PLAIN_SGD: Final = frozenset({"miner", "scaffold"})
# These take no step with the client's optimizer: they bring their own, or none.
_NO_OPTIMIZER: Final = frozenset({"bo-rep", "bo-rep-local-upper", "eggroll", "field-space"})

# These reply the received model as the client's optimizer trained it.
_TRAINED: Final = frozenset({"sgd", "prox", "dyn"})


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
