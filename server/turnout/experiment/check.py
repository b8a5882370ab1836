"""Checks of an experiment beyond single keys: methods exist, their options fit, values are possible."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pydantic import ValidationError

from turnout.experiment.methods import find_strategy, has_torch
from turnout.experiment.options import (
    NONE_WORD,
    Option,
    Problem,
    accepted_options,
    check_options,
    shown_value,
)
from turnout.experiment.sections import EXTERNAL, Method, Section
from turnout.wire import ConfigError, find, unknown_name

if TYPE_CHECKING:
    from turnout.client import TrainOptions

S = TypeVar("S", bound=Section)

KNOWN: Final = "known"  # strategy.participation: the probabilities of [participation]
_CARRIED: Final = "carried_vectors"
_HIDDEN: Final[Mapping[str, Collection[str]]] = {
    "task": ("train", "test"),
    "client": ("task", "mods"),
    "participation": ("num_clients", "probabilities"),
    "strategy": (),
    "link": (),
    "peft": (),
}
# What methods of a section are registered as, where it is not the section's name.
_KINDS: Final = {"peft": "adapter"}
_PYDANTIC: Final = {
    "int_type": "must be a whole number.",
    "float_type": "must be a number.",
    "string_type": "must be text in quotes.",
}


def check_section(name: str, table: Mapping[str, Any], model: type[S]) -> tuple[S | None, list[Problem]]:
    """Return a section with fixed keys, or what is wrong with it."""
    try:
        return model.model_validate(dict(table)), []
    except ValidationError as error:
        problems = []
        for found in error.errors(include_url=False):
            key = str(found["loc"][0]) if found["loc"] else ""
            if found["type"] == "extra_forbidden":
                message = str(unknown_name(f"key in [{name}]", key, model.model_fields))
            else:
                reason = _PYDANTIC.get(found["type"], found["msg"].removeprefix("Input ") + ".")
                message = f"{name}.{key} = {shown_value(table.get(key))}: {reason}"
            problems.append(Problem((name, key), message))
        return None, problems


def check_experiment(values: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the sections with converted options and filled defaults, and every problem found."""
    task = values.get("task")
    external = task is not None and task.name == EXTERNAL
    if task is not None and not external and not has_torch():
        return values, [
            Problem(
                ("task", "name"),
                f"task.name = {task.name!r} needs PyTorch, which is not installed here; pip install torch, "
                f"or take task.name = {EXTERNAL!r}, whose clients bring an app of their own.",
            )
        ]
    checked, problems = dict(values), []
    for section in ("task", "peft", "strategy", "participation", "link"):
        method = values.get(section)
        if method is not None:
            checked[section], found = check_method(section, method)
            problems += found
    if external:
        if values.get("peft") is not None:
            problems.append(
                Problem(
                    ("peft",),
                    f"[peft] has no effect: task.name = {EXTERNAL!r} leaves the model to the clients' own "
                    "app; remove the section.",
                )
            )
        checked["client"] = {}  # Nobody reads it: how its clients train is their app's affair.
    else:
        checked["client"], found = check_client(values.get("client", {}), "client")
        problems += found
        strategy = checked["strategy"]
        if not problems and strategy is not None:
            problems = _check_fit(strategy, checked["task"], checked["client"])
            checked["strategy"] = _carrying(strategy, checked["client"])
            problems += _check_reply(checked)
    for name, settings in values.get("strategies", {}).items():
        problems += _check_alias(name, settings)
    return checked, problems


def check_client(options: Mapping[str, Any], section: str) -> tuple[dict[str, Any], list[Problem]]:
    """Check the options of `turnout.client.client_app`."""
    from turnout.client import TrainOptions, client_app

    known, _ = accepted_options(client_app)
    values, problems = check_options(section, options, known, hidden=_HIDDEN["client"])
    problems = problems or _attempt(section, values, lambda: TrainOptions(**values))
    return _filled(values, known, _HIDDEN["client"]), problems


def _check_fit(strategy: Method, task: Method | None, client: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with these clients for the work that the strategy gives them."""
    from turnout.client.fit import check_fit, check_task

    asked = getattr(find_strategy(strategy.name).target, "local_updates", ())
    if task is not None:
        target = find("task", task.name).target
        problems = _attempt("task", ("name",), lambda: check_task(strategy.name, asked, task.name, target))
        if problems:
            return problems
    return _attempt("client", client, lambda: check_fit(strategy.name, asked, _train_options(client)))


def _train_options(client: Mapping[str, Any]) -> TrainOptions:
    from turnout.client import TrainOptions

    options: dict[str, Any] = {key: None if value == NONE_WORD else value for key, value in client.items()}
    return TrainOptions(**options)


def _carrying(strategy: Method, client: Mapping[str, Any]) -> Method:
    """Return the strategy told of the optimizer state that clients with these options send."""
    from turnout.client.optimizer_choice import carried_names

    names = list(carried_names(_train_options(client)))
    others = {key: value for key, value in strategy.options.items() if key != _CARRIED}
    return Method(name=strategy.name, options={**others, **({_CARRIED: names} if names else {})})


def _check_reply(checked: Mapping[str, Any]) -> list[Problem]:
    """Return what stands against coded replies, if clients are to send them."""
    if checked["client"]["reply"] != "coded":
        return []
    strategy, link = checked["strategy"].name, checked.get("link")
    reason = None
    if link is not None:
        reason = f"link {link.name!r} changes or reads the numbers"
    elif not hasattr(find_strategy(strategy).target, "local_updates"):
        reason = f"strategy {strategy!r} is Flower's, which reads plain arrays"
    if reason is None:
        return []
    return [Problem(("client", "reply"), f"[client] reply='coded', but {reason}; use reply='dense'.")]


def check_method(section: str, method: Method) -> tuple[Method, list[Problem]]:
    """Return a section that names a method, options converted and defaults filled in, and what is wrong."""
    key = "model" if section == "participation" else "name"
    try:
        entry = (
            find_strategy(method.name)
            if section == "strategy"
            else find(_KINDS.get(section, section), method.name)
        )
        target, key = entry.target, "partition"
        known = _known_options(section, method, target)
    except ConfigError as error:
        return method, [Problem((section, key), f"{section}.{key}: {error}")]
    options = dict(method.options)
    hidden = _HIDDEN[section]
    problems: list[Problem] = []
    extra: dict[str, Any] = {}
    if section == "participation" and "probabilities" in known:
        extra, problems = _check_probabilities(options)
        options.pop("probabilities", None)
    if section == "strategy" and options.get("participation") == KNOWN and "participation" in known:
        extra = {"participation": options.pop("participation")}
    values, found = check_options(section, options, known, hidden=hidden)
    problems += found
    if section != "task" and not problems:  # A task says by itself what it lacks.
        needed = [n for n, option in known.items() if option.required and n not in (*values, *hidden)]
        problems += [
            Problem((section,), f"{section}.{n} is missing: {method.name} needs it.") for n in needed
        ]
    if section == "strategy" and not problems:
        extra, found = _check_strategy(target, values, extra, known)
        problems += found
    if section in ("link", "peft") and not problems:
        problems += _attempt(section, values, lambda: target(**values))
    return Method(name=method.name, options={**_filled(values, known, hidden), **extra}), problems


def _check_strategy(
    target: Callable[..., Any], values: Mapping[str, Any], extra: dict[str, Any], known: Mapping[str, Option]
) -> tuple[dict[str, Any], list[Problem]]:
    """Try the strategy out; one that cannot do without participation probabilities gets the known ones."""
    stand_in = dict.fromkeys(extra, 1.0)
    problems = _attempt("strategy", values, lambda: target(**values, **stand_in))
    if problems and not extra and "participation" in known and "participation" not in values:
        retried = _attempt("strategy", values, lambda: target(**values, participation=1.0))
        if not retried:
            return {"participation": KNOWN}, []
    return extra, problems


def _known_options(section: str, method: Method, target: Any) -> dict[str, Option]:
    known, others = accepted_options(target)
    if section == "task" and others and "partition" in known:
        # A task's further options are those of its partitioner.
        name = method.options.get("partition", known["partition"].default)
        if isinstance(name, str):
            known |= accepted_options(find("partitioner", name).target)[0]
    return {name: option for name, option in known.items() if name != "partition_options"}


def _check_alias(name: str, settings: Any) -> list[Problem]:
    section = f"strategies.{name}"
    if not isinstance(settings, Mapping):
        return [Problem(("strategies", name), f"{section}: this is a section; write [{section}].")]
    slug = settings.get("name", name)
    client = settings.get("client", {})
    options = {key: value for key, value in settings.items() if key not in ("name", "client")}
    try:
        target = find_strategy(slug).target
    except ConfigError as error:
        hint = f' To give a strategy another name, add name = "..." to [{section}].' if slug == name else ""
        return [Problem(("strategies", name), f"{section}: {error}{hint}")]
    known = accepted_options(target)[0]
    extra = {
        key: options.pop(key) for key in ("participation",) if options.get(key) == KNOWN and key in known
    }
    values, problems = check_options(section, options, known)
    if not problems:
        problems = [
            Problem(("strategies", name, *p.path[1:]), p.message)
            for p in _check_strategy(target, values, extra, known)[1]
        ]
    if not isinstance(client, Mapping):
        return [*problems, Problem(("strategies", name, "client"), f"{section}.client: must be a table.")]
    return problems + check_client(client, f"{section}.client")[1]


def _check_probabilities(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    from turnout.experiment.participation import check_probabilities

    path = ("participation", "probabilities")
    if "probabilities" not in options:
        return {}, [
            Problem(
                ("participation",),
                "participation.probabilities is missing: give one number, a list with one number per client, "
                'or a rule such as { kind = "label-correlated" } or { kind = "two-group", p_low = 0.1 }.',
            )
        ]
    value = options["probabilities"]
    try:
        return {"probabilities": check_probabilities(value)}, []
    except ConfigError as error:
        return {}, [Problem(path, f"participation.probabilities = {shown_value(value)}: {error}")]


def _attempt(section: str, values: Collection[str], make: Callable[[], Any]) -> list[Problem]:
    try:
        make()
    except (ConfigError, TypeError, ValueError) as error:
        return [Problem(blamed(section, values, str(error)), f"[{section}] {error}")]
    return []


def blamed(section: str, options: Collection[str], message: str) -> tuple[str, ...]:
    """Return the key that ``message`` is about: the first option that it names, else the section."""
    found = [
        (match.start(), name) for name in options if (match := re.search(rf"\b{re.escape(name)}\b", message))
    ]
    path = tuple(section.split("."))
    return (*path, min(found)[1]) if found else path


def _filled(
    values: Mapping[str, Any], known: Mapping[str, Option], hidden: Collection[str]
) -> dict[str, Any]:
    """Return ``values`` with defaults; seeds are left to ``run.seed`` unless given."""
    filled = dict(values)
    for name, option in known.items():
        if name in filled:
            if filled[name] is None and option.default is not None:
                filled[name] = NONE_WORD
        elif name != "seed" and name not in hidden and isinstance(option.default, (bool, int, float, str)):
            filled[name] = option.default
    return filled
