"""Which optimizers clients can name, whether the settings fit, and how one is made."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, get_args

import torch
from torch import Tensor, nn

from turnout.optim import ModuleOptimizer, StatePolicy
from turnout.tasks.validation import check_count
from turnout.wire import keys
from turnout.wire.errors import ConfigError, unknown_name
from turnout.wire.registry import methods

if TYPE_CHECKING:
    from turnout.client.options import TrainOptions

_KIND: Final = "optimizer"
# These need closures, sparse gradients or matrices; the flat parameter is one dense vector.
_UNFIT: Final = frozenset({"Optimizer", "LBFGS", "SparseAdam", "Muon"})
# What `client_app` sets by options of its own, and what cannot be written in a file.
_ELSEWHERE: Final = frozenset(
    {"params", "lr", "foreach", "fused", "capturable", "differentiable", "generator"}
)
_STEP: Final = "step"


def torch_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """Return the ``torch.optim`` classes that can train a flat vector, by lower-case name."""
    return {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name not in _UNFIT
    }


def optimizer_class(name: object) -> type[torch.optim.Optimizer]:
    """Return the class of a registered optimizer or of ``torch.optim``; `ConfigError` for another name."""
    known: dict[str, type[torch.optim.Optimizer]] = {
        **torch_optimizers(),
        **{entry.slug: entry.target for entry in methods(_KIND)},
    }
    if not isinstance(name, str) or name.lower() not in known:
        raise unknown_name(_KIND, str(name), known)
    return known[name.lower()]


def module_optimizer(name: str) -> type[ModuleOptimizer] | None:
    """Return the registered class called ``name``, None when it is one of ``torch.optim``."""
    kind = optimizer_class(name)
    return kind if issubclass(kind, ModuleOptimizer) else None


def check_choice(options: TrainOptions) -> None:
    """Raise `ConfigError` unless optimizer, its settings and its state's policy fit together."""
    kind = optimizer_class(options.optimizer)
    accepted = inspect.signature(kind).parameters
    for name in ("momentum", "weight_decay"):
        if getattr(options, name) and name not in accepted:
            raise ConfigError(
                f"{name}={getattr(options, name)} has no effect: optimizer {options.optimizer!r} has "
                f"no {name}; set {name}=0 or choose another optimizer."
            )
    policies = get_args(StatePolicy)
    if options.optimizer_state not in policies:
        raise unknown_name("optimizer_state", str(options.optimizer_state), policies)
    _check_table(options, [name for name in accepted if name not in _ELSEWHERE])
    if not options.own_sgd:  # It has no class: the first optimizer of torch.optim costs a second of imports.
        _try(options)
    state_warning(options)
    if options.reply == "coded":
        _check_coding(options)
    if options.optimizer_state != "reset":
        names = _stateful(options)
        if options.optimizer_state == "send":
            _check_sendable(options, names)


def _check_coding(options: TrainOptions) -> None:
    method = module_optimizer(options.optimizer)
    if method is None:
        raise ConfigError(
            f"reply='coded': optimizer {options.optimizer!r} has no code for its weights; use reply='dense', "
            "or an optimizer with one (frugal, eco-sgd, eco-adamw)."
        )
    method.check_coding(_settings(options))


def _check_table(options: TrainOptions, accepted: list[str]) -> None:
    table = options.optimizer_options
    if not isinstance(table, Mapping):
        raise ConfigError(f"optimizer_options={table!r} is not possible; use a table of the class's options.")
    if options.own_sgd and table:
        raise ConfigError(
            f"optimizer_options={dict(table)!r}: optimizer 'sgd' has momentum and weight_decay only, which "
            "are options of [client] itself; leave optimizer_options out."
        )
    if "seed" in accepted and "seed" in table:
        check_count("seed in optimizer_options", table["seed"], low=0)
    for name in table:
        if name not in accepted:
            raise unknown_name("optimizer_options key", str(name), accepted)
        if getattr(options, name, None) and name in ("momentum", "weight_decay"):
            raise ConfigError(f"{name} is given twice, also in optimizer_options; give it once.")


def _try(options: TrainOptions) -> None:
    """Make the optimizer once, for a model of two layers: the class checks its own values."""
    try:
        make(options, _small_module(), torch.zeros(2, requires_grad=True), options.lr, seed=0)
    except ConfigError as error:
        raise ConfigError(f"optimizer_options, {options.optimizer!r}: {error}") from error
    except Exception as error:  # A class of torch.optim meets values that it has not foreseen.
        raise ConfigError(
            f"optimizer_options={dict(options.optimizer_options)!r}: {options.optimizer!r} refuses them: "
            f"{error}; correct the value."
        ) from error


def state_warning(options: TrainOptions) -> str | None:
    """Return the optimizer's warning about the policy; raises `ConfigError` where it breaks the method."""
    kind = module_optimizer(options.optimizer)
    if kind is None:
        return None
    return kind.advise(options.optimizer_state, _settings(options), options.local_steps)


def make(
    options: TrainOptions, module: nn.Module, leaf: Tensor, lr: float, *, seed: int
) -> torch.optim.Optimizer:
    """Return a new optimizer.

    One of the library trains ``module``'s own parameters, of which it knows shapes and roles; one of
    ``torch.optim`` trains ``leaf``, the flat vector. ``lr`` may differ from the configured one (a
    schedule): all rates of the optimizer follow it.
    """
    kind, settings = optimizer_class(options.optimizer), _settings(options)
    if issubclass(kind, ModuleOptimizer):
        if kind.seeding is not None:
            settings["seed"] = seed
        optimizer: torch.optim.Optimizer = kind.for_module(module, lr=options.lr, **settings)
    else:
        optimizer = kind([leaf], lr=options.lr, **settings)  # type: ignore[call-arg]
    if lr != options.lr:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * (lr / options.lr) if group["lr"] != options.lr else lr
    return optimizer


def _settings(options: TrainOptions) -> dict[str, Any]:
    shared = {name: getattr(options, name) for name in ("momentum", "weight_decay") if getattr(options, name)}
    return {**shared, **options.optimizer_options}


def carried_names(options: TrainOptions) -> tuple[str, ...]:
    """Return the names of the records in which the optimizer's state travels, none unless it is sent."""
    if options.optimizer_state != "send":
        return ()
    return tuple(f"{keys.OPTIMIZER}.{name}" for name in _stateful(options))


def _stateful(options: TrainOptions) -> tuple[str, ...]:
    """Return what can be averaged of the optimizer's state; `ConfigError` if it has no state at all."""
    kind = module_optimizer(options.optimizer)
    if kind is not None:
        return kind.carried_state(_settings(options))
    names = _state_of(options.optimizer.lower(), json.dumps(_settings(options), sort_keys=True))
    if not names:
        raise ConfigError(
            f"optimizer_state={options.optimizer_state!r} has no effect: {options.optimizer!r} has no state "
            "with these settings; use optimizer_state='reset', or momentum above 0 for 'sgd'."
        )
    return tuple(name for name in names if name != _STEP)


def _check_sendable(options: TrainOptions, names: tuple[str, ...]) -> None:
    if not names:
        raise ConfigError(
            f"optimizer_state='send': the state of {options.optimizer!r} is not made of averages, and their "
            "mean would mean nothing; use 'reset' or 'keep'."
        )


@lru_cache(maxsize=64)
def _state_of(name: str, settings: str) -> tuple[str, ...]:
    """Return the names of a ``torch.optim`` class's state, as one step makes it.

    Empty without state; ("step",) alone when there are other scalars than a step count, which have no mean.
    """
    leaf = torch.zeros(3, requires_grad=True)
    leaf.grad = torch.ones(3)
    optimizer = optimizer_class(name)([leaf], **json.loads(settings))
    optimizer.step()
    state = {key: value for key, value in optimizer.state[leaf].items() if value is not None}
    tensors = [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == leaf.shape]
    if state and set(state) - set(tensors) <= {_STEP} and tensors:
        return tuple(tensors)
    return (_STEP,) if state else ()


def _small_module() -> nn.Module:
    """Return a model of two layers without numbers: making it draws none."""
    return nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 2, device="meta"))
