"""Where a value of an experiment came from: a line of the TOML file, or ``--set`` on the command line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from turnout.wire import ConfigError

KeyPath = tuple[str, ...]

_TABLE: Final = re.compile(r"\s*\[([^\[\]]+)\]\s*(#.*)?$")
_ENTRY: Final = re.compile(
    r"\s*((?:[\w-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[\w-]+|\"[^\"]*\"|'[^']*'))*)\s*="
)
_PART: Final = re.compile(r"\"([^\"]*)\"|'([^']*)'|([\w-]+)")


@dataclass(frozen=True)
class Source:
    """Knows the place of every key: ``lines`` of the file, and the ``overrides`` as they were typed.

    ``moved`` says which keys were written elsewhere than where they are used.
    """

    name: str = "experiment"
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    overrides: Mapping[KeyPath, str] = field(default_factory=dict)
    moved: Mapping[KeyPath, KeyPath] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Return where ``path``, or the nearest table around it, was written."""
        path = self.moved.get(path, path)
        for length in range(len(path), 0, -1):
            if path[:length] in self.overrides:
                return f"--set {self.overrides[path[:length]]}"
        inside = [typed for typed in self.overrides if typed[: len(path)] == path]
        if inside:
            return f"--set {self.overrides[inside[-1]]}"
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.name}:{self.lines[path[:length]]}"
        return self.name

    def error(self, path: KeyPath, message: str) -> ConfigError:
        """Return an error about the key ``path``."""
        return ConfigError(f"{self.place(path)}: {message}")


def read_toml(path: Path) -> tuple[dict[str, Any], Source]:
    """Read an experiment file; raises `ConfigError` naming file and line when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"experiment file {path} does not exist; check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"experiment file {path} cannot be read: {error}.") from error
    try:
        return tomllib.loads(text), Source(str(path), key_lines(text))
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        place = f"{path}:{line[1]}" if line else f"{path}:{len(text.splitlines())}"
        raise ConfigError(f"{place}: not valid TOML: {error}.") from error


def key_lines(text: str) -> dict[KeyPath, int]:
    """Return the line (from 1) on which each table and key of a TOML text starts."""
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for number, line in enumerate(text.splitlines(), start=1):
        header = _TABLE.match(line)
        if header:
            table = _parts(header[1])
            lines.setdefault(table, number)
            continue
        entry = _ENTRY.match(line)
        if entry:
            path = (*table, *_parts(entry[1]))
            lines.setdefault(path, number)
            for inner in _ENTRY.finditer(line, entry.end()):
                lines.setdefault((*path, *_parts(inner[1])), number)
    return lines


def apply_overrides(
    data: Mapping[str, Any], overrides: Iterable[str], source: Source
) -> tuple[dict[str, Any], Source]:
    """Return ``data`` with every ``section.key=value`` set; the value is TOML, or text when it is not.

    Raises `ConfigError` for an override that is not of that form.
    """
    result = _copied(data)
    typed: dict[KeyPath, str] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        path = _parts(name.strip())
        if not equals or len(path) < 2 or not re.fullmatch(r"[\w.\"' -]+", name):
            raise ConfigError(
                f"--set {override}: write section.key=value, for example --set strategy.beta=0.3."
            )
        node = result
        for part in path[:-1]:
            inner = node.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {override}: {part!r} is a value, not a section.")
            node = inner
        node[path[-1]] = _toml_value(text.strip())
        typed[path] = override
    return result, replace(source, overrides={**source.overrides, **typed})


def _copied(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in data.items()}


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # A bare word, as one types in a shell: --set participation.model=markov


def _parts(name: str) -> KeyPath:
    return tuple(next(group for group in match if group is not None) for match in _groups(name))


def _groups(name: str) -> Iterable[tuple[str | None, ...]]:
    return (match.groups() for match in _PART.finditer(name))
