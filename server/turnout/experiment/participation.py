"""The ``[participation]`` section: from what is written to a participation model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from turnout.experiment.options import accepted_options, check_options
from turnout.experiment.sections import Method
from turnout.simulation import constant, given, label_correlated, two_group
from turnout.simulation.participation import ParticipationModel
from turnout.wire import ConfigError, NDArray, find, unknown_name

RULES: Final[Mapping[str, Callable[..., Any]]] = {
    "constant": constant,
    "label-correlated": label_correlated,
    "two-group": two_group,
}
_NOT_WRITTEN: Final = ("num_clients", "label_distribution")


class Clients(Protocol):
    """What participation depends on; a task is one."""

    num_clients: int

    def label_distribution(self) -> NDArray:
        """Return each client's share of labels, shape (num_clients, classes)."""


def check_probabilities(value: Any) -> Any:
    """Return ``value`` (one number, a list, or a table with a rule's ``kind``) with its values checked.

    Raises `ConfigError` naming value and fix.
    """
    if isinstance(value, Mapping):
        return _check_rule(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, list)):
        raise ConfigError("must be a number, a list of numbers, or a table with a kind.")
    if isinstance(value, list):
        given(value, allow_zero=True)  # Zeros are refused or not by the model's own allow_zero.
        return [float(p) for p in value]
    if not 0.0 < value <= 1.0:
        raise ConfigError("a probability must be above 0 and at most 1.")
    return float(value)


def _check_rule(table: Mapping[str, Any]) -> dict[str, Any]:
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in RULES:
        raise unknown_name("kind", str(kind), RULES)
    rule = RULES[kind]
    known, _ = accepted_options(rule)
    options = {key: value for key, value in table.items() if key != "kind"}
    values, problems = check_options("participation.probabilities", options, known, hidden=_NOT_WRITTEN)
    if problems:
        raise ConfigError(" ".join(problem.message for problem in problems))
    missing = [n for n, o in known.items() if o.required and n not in values and n not in _NOT_WRITTEN]
    if missing:
        raise ConfigError(f"{missing[0]} is missing; add it to the table.")
    # Tried on one client with one label, so that impossible values are found before any data are read.
    rule(
        **values, **({"label_distribution": [[1.0]]} if "label_distribution" in known else {"num_clients": 1})
    )
    defaults = {
        name: option.default
        for name, option in known.items()
        if name not in (*_NOT_WRITTEN, "seed") and not option.required
    }
    return {"kind": kind, **defaults, **values}


def depends_on_data(section: Method) -> bool:
    """Return whether the probabilities of ``section`` follow from what clients hold."""
    written = section.options.get("probabilities")
    rule = RULES.get(str(written.get("kind"))) if isinstance(written, Mapping) else None
    return rule is not None and "label_distribution" in accepted_options(rule)[0]


def build_participation(section: Method, task: Clients, seed: int) -> ParticipationModel:
    """Return the participation model of ``section`` for the clients of ``task``.

    Raises `ConfigError` when it does not fit them.
    """
    target = find("participation", section.name).target
    known, _ = accepted_options(target)
    options = dict(section.options)
    if "probabilities" in known:
        written = options["probabilities"]
        options["probabilities"] = _vector(written, task, seed)
        if isinstance(written, Mapping):
            options["allow_zero"] = True  # Only clients without data get 0, and those have nothing to send.
    if "num_clients" in known:
        options["num_clients"] = task.num_clients
    if "seed" in known:
        options.setdefault("seed", seed)
    model: ParticipationModel = target(**options)
    if model.num_clients != task.num_clients:
        raise ConfigError(
            f"participation is for {model.num_clients} clients but the task has "
            f"num_clients={task.num_clients}; give one column or probability per client."
        )
    return model


def _vector(written: Any, task: Clients, seed: int) -> Any:
    if isinstance(written, list):
        return given(written, num_clients=task.num_clients, allow_zero=True)
    if not isinstance(written, Mapping):
        return constant(task.num_clients, written)
    rule = RULES[written["kind"]]
    values = {key: value for key, value in written.items() if key != "kind"}
    known, _ = accepted_options(rule)
    if "seed" in known:
        values.setdefault("seed", seed)
    if "label_distribution" in known:
        return rule(task.label_distribution(), **values)
    return rule(task.num_clients, **values)
