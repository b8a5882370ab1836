"""Reads a Dockerfile as far as its tests need: stages, and their instructions in order."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """One stage: its base as written, its name, and (instruction, arguments) pairs."""

    base: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [text for found, text in self.instructions if found == instruction]

    def last(self, instruction: str) -> str:
        return self.all(instruction)[-1]

    def exec_form(self, instruction: str) -> list[str]:
        """Return the words of an instruction in exec form. Raises ValueError for the shell form."""
        text = self.last(instruction)
        if instruction == "HEALTHCHECK":
            text = text.partition("CMD")[2].strip()
        words: list[str] = json.loads(text)
        return words

    def environment(self) -> dict[str, str]:
        return dict(word.split("=", 1) for text in self.all("ENV") for word in shlex.split(text))


@dataclass
class Dockerfile:
    arguments: dict[str, str]
    stages: list[Stage]

    @classmethod
    def read(cls, path: Path) -> Dockerfile:
        text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        arguments: dict[str, str] = {}
        stages: list[Stage] = []
        for line in re.sub(r"\\\n", " ", text).splitlines():
            instruction, _, rest = line.strip().partition(" ")
            rest = " ".join(rest.split())
            if instruction == "FROM":
                base, _, name = rest.partition(" AS ")
                stages.append(Stage(base, name))
            elif instruction == "ARG" and not stages:
                name, _, value = rest.partition("=")
                arguments[name] = value
            elif instruction:
                stages[-1].instructions.append((instruction, rest))
        return cls(arguments, stages)

    def stage(self, name: str = "") -> Stage:
        """Return the stage of that name, the last one by default."""
        return next(stage for stage in reversed(self.stages) if name in ("", stage.name))

    def base(self, stage: Stage) -> str:
        """Return the image that ``stage`` begins with, arguments filled in; stages are followed."""
        name = re.sub(r"\$\{(\w+)\}", lambda match: self.arguments[match[1]], stage.base)
        earlier = [other for other in self.stages if other.name == name]
        return self.base(earlier[0]) if earlier else name
