"""The sections of an experiment that have fixed keys, and the form of those that name a method."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of the sections: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RunSection(Section):
    """The run: how long, from which seed, where its results go."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "experiment"
    """Name of the run's directory and row."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds data split, initial model, minibatches, participation, link noise and strategy."""
    rounds: Annotated[int, Field(ge=1)] = 50
    """Number of rounds."""
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    """Evaluate the global model every so many rounds (and after the last)."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 1
    """Write a checkpoint every so many rounds (and after the last)."""
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Accuracy whose first round is reported; a run that never reaches it exits with code 4."""
    directory: Annotated[str, Field(min_length=1)] = "runs"
    """Folder of the run directories."""
    store: Annotated[str, Field(min_length=1)] | None = None
    """Run store: a database URL or an SQLite file; by default turnout.sqlite in ``directory``."""


class SimulationSection(Section):
    """How clients are run in this process."""

    executor: Literal["serial", "threads"] = "serial"
    """``serial`` or ``threads``; the results are the same, bit for bit."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Threads to use; by default one per CPU."""


class Method(Section):
    """A section that names a registered method and sets its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    def as_table(self, key: str = "name") -> dict[str, Any]:
        """Return the section as it is written in TOML."""
        return {key: self.name, **self.options}
