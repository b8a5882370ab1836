"""A griffe extension: what a strategy overrides is documented once, at the base class."""

from __future__ import annotations

from typing import Any

import griffe

BASES = ("turnout.strategies.algorithm.Algorithm", "turnout.strategies.streaming.StreamingStrategy")


class OverridesOnce(griffe.Extension):
    """Leaves out of the reference the methods by which strategies fill in `StreamingStrategy`."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Drop them once everything was read and bases can be looked up."""
        strategies = pkg.members.get("strategies")
        if not isinstance(strategies, griffe.Module):
            return
        promised = {name for base in BASES for name in pkg[base.removeprefix("turnout.")].members}
        for module in strategies.modules.values():
            for cls in module.classes.values():
                if cls.path not in BASES and any(base.path in BASES for base in cls.mro()):
                    for name in promised.intersection(cls.members) - {"__init__"}:
                        del cls.members[name]
