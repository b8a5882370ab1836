"""The register of methods: what the command line, the experiment file and the docs list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from turnout.wire.errors import unknown_name

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """One registered method. ``paper`` is an arXiv id, or None for what no single paper introduced."""

    slug: str
    kind: str
    paper: str | None
    class_path: str
    summary: str
    target: Any


_entries: dict[tuple[str, str], MethodEntry] = {}


def register(slug: str, kind: str, paper: str | None = None, summary: str = "") -> Callable[[T], T]:
    """Register a class or function under ``kind`` and ``slug``; ``summary`` defaults to its doc line."""

    def add(target: T) -> T:
        doc = (getattr(target, "__doc__", None) or "").strip().splitlines()
        path = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', slug)}"
        entry = MethodEntry(slug, kind, paper, path, summary or (doc[0] if doc else ""), target)
        known = _entries.setdefault((kind, slug), entry)
        if known.class_path != path:
            raise ValueError(f"{kind} {slug!r} is registered twice: {known.class_path} and {path}")
        return target

    return add


def methods(kind: str | None = None) -> list[MethodEntry]:
    """Return the registered methods (of one kind), sorted by kind and slug."""
    return [entry for key, entry in sorted(_entries.items()) if kind is None or key[0] == kind]


def find(kind: str, slug: str) -> MethodEntry:
    """Return one method; an unknown slug raises `ConfigError` that suggests the nearest known one."""
    entry = _entries.get((kind, slug))
    if entry is None:
        raise unknown_name(kind, slug, (known for known_kind, known in _entries if known_kind == kind))
    return entry
