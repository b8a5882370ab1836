"""The sections of an experiment that have fixed keys, and the form of those that name a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

EXTERNAL: Final = "external"  # The task of clients that bring an app and data of their own.


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
    """Rounds from one evaluation of the global model to the next (the last round's is always evaluated)."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 1
    """Rounds from one checkpoint to the next (the last round always writes one)."""
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Accuracy whose first round is reported; a run that never reaches it exits with code 4."""
    directory: Annotated[str, Field(min_length=1)] = "runs"
    """Folder of the run directories."""
    store: Annotated[str, Field(min_length=1)] | None = None
    """Run store: a database URL or an SQLite file; by default turnout.sqlite in ``directory``."""


class SimulationSection(Section):
    """How clients are run in this process."""

    executor: Literal["auto", "serial", "threads", "processes", "batched"] = "auto"
    """``serial``, ``threads`` and ``processes`` give the same results, bit for bit; ``batched`` trains many
    clients as one tensor program, up to rounding (1e-5). ``auto`` picks by app, model and cohort."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Threads or processes to use; by default one per CPU."""
    exact: bool = True
    """``auto`` picks only executors whose results are bit-equal to ``serial``; false lets it pick
    ``batched``, which is faster."""


class FleetSection(Section):
    """How a server deals with remote clients; durations are in seconds, sizes in bytes."""

    participation: Literal["experiment", "live"] = "experiment"
    """``experiment``: the section ``participation`` says who takes part in a round, and a round waits for
    those clients, so that a server run equals a simulated one. ``live``: whoever is connected takes part."""
    min_clients: Annotated[int, Field(ge=1)] = 1
    """A live round begins when this many clients are connected; a planned one begins when ``wait`` is over
    with those that are there, if they are this many."""
    wait: Annotated[float, Field(gt=0)] | None = None
    """Longest wait for the clients of a round, by default for ever; too few by then: exit code 4."""
    deadline: Annotated[float, Field(gt=0)] | None = None
    """A round closes this long after its requests went out, if ``quorum`` replies are in."""
    quorum: Annotated[int, Field(ge=1)] = 1
    """Good replies that a round waits for beyond its deadline."""
    enough: Annotated[float, Field(gt=0)] | None = None
    """Good replies that close a round at once: up to 1 a share of the clients asked, above 1 a number."""
    timeout: Annotated[float, Field(gt=0)] = 3600.0
    """A round closes after this time whatever has come."""
    reconnect: Annotated[float, Field(gt=0)] = 30.0
    """A client whose connection is lost has this long to come back."""
    upload_slots: Annotated[int, Field(ge=1)] = 4
    """Replies received at the same time; each takes memory of its size."""
    min_rate: Annotated[float, Field(gt=0)] = 64e3
    """Bytes per second that an upload must sustain."""
    stall: Annotated[float, Field(gt=0)] = 10.0
    """How long an upload may be slower than that before its slot goes to another client."""
    max_offences: Annotated[int, Field(ge=1)] = 3
    """Refused replies and broken frames after which a client gets no more work until the server restarts."""
    same_identity: Literal["newest", "refuse"] = "newest"
    """A client that connects while it is connected replaces its older stream, or is refused meanwhile."""
    max_reply_bytes: Annotated[int, Field(ge=1)] | None = None
    """Largest reply; by default four times the request's arrays and 1 MiB."""
    device: Annotated[str, Field(min_length=1)] | None = None
    """Only clients on this device take part: ``cpu``, ``cuda``, or more of its name."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Only clients with all of these tags take part (``turnout client --tag KEY=VALUE``)."""
    min_examples: Annotated[int, Field(ge=0)] = 0
    """Only clients that say that they have this many examples take part."""

    def eligible(self, attributes: Mapping[str, Any]) -> bool:
        """Return whether a client with these ``attributes`` (device, examples, tags) may take part."""
        device, tags = str(attributes.get("device", "")), attributes.get("tags", {})
        return (
            (self.device is None or device.startswith(self.device))
            and all(tags.get(key) == value for key, value in self.tags.items())
            and int(attributes.get("examples", 0)) >= self.min_examples
        )


class Method(Section):
    """A section that names a registered method and sets its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    def as_table(self, key: str = "name") -> dict[str, Any]:
        """Return the section as it is written in TOML."""
        return {key: self.name, **self.options}
