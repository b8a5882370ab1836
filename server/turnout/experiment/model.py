"""The experiment: what is computed, from one TOML file, for every engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pydantic import Field, PrivateAttr, ValidationError

from turnout.experiment.check import check_experiment, check_method, check_section
from turnout.experiment.methods import SERVER_PACKAGES, find_strategy, load_methods, load_methods_of
from turnout.experiment.options import NONE_WORD, Problem
from turnout.experiment.sections import FleetSection, Method, RunSection, Section, SimulationSection
from turnout.experiment.source import KeyPath, Source, apply_overrides, read_toml
from turnout.wire import ConfigError, unknown_name

FIXED: Final[Mapping[str, type[Section]]] = {
    "run": RunSection,
    "simulation": SimulationSection,
    "fleet": FleetSection,
}
SECTIONS: Final = ("task", "peft", "client", "strategy", "participation", "link", "strategies", *FIXED)


class Experiment(Section):
    """A checked experiment. Make one with `load_experiment` or `Experiment.from_dict`.

    The options of ``task``, ``peft``, ``client``, ``strategy``, ``participation`` and ``link`` are those of
    the classes they name, defaults filled in. ``strategies`` holds the settings that `variant` applies.
    """

    run: RunSection = RunSection()
    task: Method
    peft: Method | None = None
    client: dict[str, Any] = Field(default_factory=dict)
    strategy: Method
    participation: Method
    link: Method | None = None
    simulation: SimulationSection = SimulationSection()
    fleet: FleetSection = FleetSection()
    strategies: dict[str, dict[str, Any]] = Field(default_factory=dict)
    label: str = ""
    """Name of the run among others: the strategy, or its alias in ``strategies``."""

    _source: Source = PrivateAttr(default_factory=Source)

    @property
    def source(self) -> Source:
        """Where the values were written, for error messages."""
        return self._source

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: Source | None = None) -> Experiment:
        """Check ``data`` (the content of an experiment file) and return the experiment.

        Raises `ConfigError` that lists every problem with its place, value and fix.
        """
        source = source or Source()
        values, problems = _parse_sections(data)
        task = values.get("task")
        load_methods_of(None if task is None else task.name, data)
        values, found = check_experiment(values)
        problems += found
        if problems:
            raise ConfigError("\n".join(f"{source.place(p.path)}: {p.message}" for p in problems))
        experiment = cls(**values, label=values["strategy"].name)
        experiment._source = source
        return experiment

    @classmethod
    def from_stored(cls, config: Mapping[str, Any], label: str) -> Experiment:
        """Return the experiment of a stored run, which was checked when the run was made.

        What a server needs is looked at again (strategy, participation); what needs PyTorch to be looked at
        is not, since a server that comes back has clients waiting. Raises `ConfigError` when it cannot be
        read any more, as with a run of another version.
        """
        load_methods(*SERVER_PACKAGES)
        source = Source("stored experiment")
        values, problems = _parse_sections(config)
        for section in ("strategy", "participation"):
            if values[section] is not None:
                values[section], found = check_method(section, values[section])
                problems += found
        if problems:
            raise ConfigError("\n".join(f"{source.place(p.path)}: {p.message}" for p in problems))
        experiment = cls(**values, label=label)
        experiment._source = source
        return experiment

    def variant(self, name: str) -> Experiment:
        """Return this experiment with the strategy ``name``: a registered one, or an alias in ``strategies``.

        Its settings are those of ``[strategies.NAME]`` (over ``[strategy]``, if that is the one); the table
        ``client`` in there changes the clients. Task, data, seed and participation stay the same.
        """
        settings = dict(self.strategies.get(name, {}))
        client = settings.pop("client", {})
        slug = settings.pop("name", name)
        find_strategy(slug)
        own = self.strategy.options if slug == self.strategy.name else {}
        data = self.resolved()
        data["strategy"] = {"name": slug, **_table(own), **settings}
        data["client"] = {**_without_rival_lengths(data["client"], client), **client}
        moved: dict[KeyPath, KeyPath] = {("strategy", key): ("strategies", name, key) for key in settings}
        moved |= {("client", key): ("strategies", name, "client", key) for key in client}
        made = Experiment.from_dict(data, source=replace(self._source, moved=moved))
        source = made._source
        made = made.model_copy(update={"label": name, "strategies": self.strategies})
        made._source = source
        return made

    def resolved(self) -> dict[str, Any]:
        """Return everything that is computed as a TOML-able table; without ``strategies``."""
        table: dict[str, Any] = {
            "run": _table(self.run.model_dump()),
            "task": _table(self.task.as_table()),
            "client": _table(self.client),
            "strategy": _table(self.strategy.as_table()),
            "participation": _table(self.participation.as_table("model")),
            "simulation": _table(self.simulation.model_dump()),
            "fleet": _table(self.fleet.model_dump()),
        }
        if self.peft is not None:
            table["peft"] = _table(self.peft.as_table())
        if self.link is not None:
            table["link"] = _table(self.link.as_table())
        return table


def load_experiment(path: str | Path, overrides: Iterable[str] = ()) -> Experiment:
    """Read an experiment file, apply ``overrides`` (``"strategy.beta=0.3"``) and check it.

    Raises `ConfigError` that lists every problem with file, line, value and fix.
    """
    path = Path(path)
    data, source = read_toml(path)
    data, source = apply_overrides(data, overrides, source)
    if isinstance(data.get("run", {}), dict):
        stem = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in path.stem)
        data["run"] = {"name": stem.strip("._-")[:64] or "experiment", **data.get("run", {})}
    return Experiment.from_dict(data, source=source)


def _parse_sections(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the sections with their fixed keys parsed; options of methods are not looked at yet."""
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, table in data.items():
        if name not in SECTIONS:
            problems.append(Problem((name,), str(unknown_name("section", name, SECTIONS))))
        elif not isinstance(table, Mapping):
            problems.append(Problem((name,), f"{name} = {table!r}: this is a section; write [{name}]."))
        elif name in FIXED:
            values[name], found = check_section(name, table, FIXED[name])
            problems += found
        elif name in ("client", "strategies"):
            values[name] = dict(table)
        else:
            values[name], found = _parse_method(name, table)
            problems += found
    for name, default in (("task", "digits"), ("strategy", "fedavg"), ("participation", "always")):
        if name not in data:
            values[name] = Method(name=default)
    return values, problems


def _parse_method(section: str, table: Mapping[str, Any]) -> tuple[Method | None, list[Problem]]:
    key = "model" if section == "participation" else "name"
    defaults = {"participation": "always", "link": "noisy"}
    name = table.get(key, defaults.get(section))
    if not isinstance(name, str):
        given = f"{section}.{key} = {name!r}" if key in table else f"{section}.{key} is missing"
        return None, [
            Problem((section, key), f'{given}: name one, for example {key} = "{_EXAMPLES[section]}".')
        ]
    options = {option: value for option, value in table.items() if option != key}
    try:
        return Method(name=name, options=options), []
    except ValidationError as error:
        return None, [Problem((section,), str(error))]


_EXAMPLES = {
    "task": "digits",
    "peft": "lora",
    "strategy": "fedavg",
    "participation": "bernoulli",
    "link": "noisy",
}


def _table(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` as TOML can hold them: None left out, tables with text keys."""
    return {str(key): _toml(value) for key, value in values.items() if value is not None}


def _toml(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _table(value)
    if isinstance(value, (list, tuple)):
        return [NONE_WORD if item is None else _toml(item) for item in value]
    return value


def _without_rival_lengths(client: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the length of local training that ``settings`` replaces by the other unit."""
    rivals = {"local_steps": "local_epochs", "local_epochs": "local_steps"}
    dropped = {rivals[key] for key in settings if key in rivals}
    return {key: value for key, value in client.items() if key not in dropped}
