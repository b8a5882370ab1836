"""Flower's own strategies by name: ``[strategy] name = "flwr:FedAdam"`` with the options of that class."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, Final

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Strategy

from turnout.strategies.stock import StockStrategy
from turnout.wire import ConfigError, keys, unknown_name
from turnout.wire.registry import register

PREFIX: Final = "flwr:"
KIND: Final = "flower-strategy"
_PLAIN: Final = {
    "FedAvg": ("1602.05629", "averages by examples"),
    "FedAdam": ("2003.00295", "Adam on the averaged update"),
    "FedYogi": ("2003.00295", "Yogi on the averaged update"),
    "FedAdagrad": ("2003.00295", "Adagrad on the averaged update"),
    "FedAvgM": ("1909.06335", "momentum on the averaged update"),
    "FedProx": ("1812.06127", "FedAvg with clients held near the model"),
    "FedMedian": ("1803.01498", "median, coordinate by coordinate"),
    "FedTrimmedAvg": ("1803.01498", "mean without the extremes, coordinate by coordinate"),
    "Krum": ("1703.02757", "the one reply that is nearest to its neighbours"),
    "MultiKrum": ("1703.02757", "average of the replies that are nearest to their neighbours"),
    "Bulyan": ("1802.07927", "Krum's choice, then a mean around the median"),
    "QFedAvg": ("1905.10497", "more weight for clients with a larger loss"),
}
_WRAPPERS: Final = {
    "DifferentialPrivacyServerSideFixedClipping": ("1710.06963", "the server clips updates and adds noise"),
    "DifferentialPrivacyServerSideAdaptiveClipping": (
        "1905.03871",
        "the server clips updates to a norm that adapts and adds noise",
    ),
    "DifferentialPrivacyClientSideFixedClipping": ("1710.06963", "clients clip, the server adds noise"),
    "DifferentialPrivacyClientSideAdaptiveClipping": (
        "1905.03871",
        "clients clip to a norm that adapts, the server adds noise",
    ),
}
# Records and metrics have the names that every engine here uses.
_FIXED: Final = ("weighted_by_key", "arrayrecord_key", "configrecord_key", "train_loss_key")
_OURS: Final[Mapping[str, Any]] = {"num_clients": int | None, "seed": int, "max_update_norm": float | None}
_DEFAULTS: Final[Mapping[str, Any]] = {"seed": 0}


def make_stock(name: str, options: Mapping[str, Any]) -> Strategy:
    """Return Flower's strategy ``name`` with ``options``; a wrapper's ``strategy`` is a name or a table.

    Clients evaluate only if ``fraction_evaluate`` is given, since the server does. Raises `ConfigError`.
    """
    if name not in _PLAIN and name not in _WRAPPERS:
        raise unknown_name("Flower strategy", name, (*_PLAIN, *_WRAPPERS))
    given = dict(options)
    accepted = inspect.signature(_class(name)).parameters
    if "train_loss_key" in accepted:
        given["train_loss_key"] = keys.TRAIN_LOSS
    if name in _WRAPPERS:
        given["strategy"] = _inner(given.get("strategy", "FedAvg"))
    try:
        strategy: Strategy = _class(name)(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{PREFIX}{name}: {error}") from error
    if isinstance(strategy, FedAvg) and "fraction_evaluate" not in options:
        strategy.fraction_evaluate, strategy.min_evaluate_nodes = 0.0, 0
    return strategy


def _inner(described: Any) -> Strategy:
    table = {"name": described} if isinstance(described, str) else dict(described)
    name = str(table.pop("name", "FedAvg")).removeprefix(PREFIX)
    if name not in _PLAIN:
        raise unknown_name("Flower strategy inside another", name, _PLAIN)
    unknown = [key for key in table if key not in _options(name)]
    if unknown:
        raise unknown_name(f"key in strategy of {name}", unknown[0], _options(name))
    return make_stock(name, table)


def _class(name: str) -> Any:
    return getattr(flower, name)


def _options(name: str) -> dict[str, inspect.Parameter]:
    """Return the options of ``name`` that a file can hold, as the class declares them."""
    cls = _class(name)
    hints = typing.get_type_hints(cls.__init__)
    options: dict[str, inspect.Parameter] = {}
    for key, parameter in inspect.signature(cls).parameters.items():
        if key in (*_FIXED, "accountant") or "Callable" in str(hints[key]):
            continue
        hint, default = hints[key], parameter.default
        if key == "strategy":
            hint, default = str | dict[str, Any], "FedAvg"
        elif key in ("fraction_evaluate", "min_evaluate_nodes"):
            hint, default = hint | None, None
        options[key] = inspect.Parameter(key, parameter.KEYWORD_ONLY, default=default, annotation=hint)
    return options


def _factory(name: str) -> Callable[..., StockStrategy]:
    """Return what makes ``name`` from an experiment's options; its signature is what is checked."""

    def make(**options: Any) -> StockStrategy:
        if options.pop("carried_vectors", None):
            raise ConfigError(
                f"{PREFIX}{name} averages nothing but the model; set optimizer_state to 'reset' or 'keep'."
            )
        ours = {key: options.pop(key) for key in _OURS if key in options}
        stock = make_stock(name, {key: value for key, value in options.items() if value is not None})
        return StockStrategy(stock=stock, **ours)

    parameters = _options(name)
    for key, hint in _OURS.items():
        default = _DEFAULTS.get(key)
        parameters[key] = inspect.Parameter(
            key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint
        )
    make.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    make.__annotations__ = {key: parameter.annotation for key, parameter in parameters.items()}
    make.__module__, make.__qualname__ = "flwr.serverapp.strategy", name
    return make


for _name, (_paper, _does) in (_PLAIN | _WRAPPERS).items():
    register(PREFIX + _name, KIND, _paper, summary=f"Flower's: {_does}")(_factory(_name))
