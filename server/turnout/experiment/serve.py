"""One run on a fleet of remote clients, recorded: `turnout.simulation.run` over the network."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from flwr.app import ArrayRecord

from turnout.experiment.build import EXTERNAL, make_participation, make_strategy, make_task
from turnout.experiment.initial import (
    keep_initial,
    keep_participation,
    read_initial,
    read_participation,
)
from turnout.experiment.model import Experiment
from turnout.experiment.recorded import (
    RunSummary,
    create_recorder,
    evaluation,
    find_run,
    open_store,
    resume_recorder,
)
from turnout.server.fleet import CommitCallback, FleetGrid, FleetOptions, FleetServer, ServerTls
from turnout.server.fleet.server import is_loopback
from turnout.server.recorder import RunRecorder
from turnout.server.store import RunStore
from turnout.strategies import Callback
from turnout.wire import ConfigError, TurnoutError

if TYPE_CHECKING:
    from turnout.simulation.participation import ParticipationModel
    from turnout.strategies import StreamingStrategy
    from turnout.tasks import Task


class AddressError(TurnoutError):
    """The server cannot listen where it was told to."""


class QuorumMissed(TurnoutError):  # noqa: N818 - an outcome
    """Too few clients came within ``fleet.wait`` seconds."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Where a server runs, as opposed to what it computes.

    ``certs`` is a directory of `turnout certs`: it makes TLS mutual. ``insecure`` allows plain text beyond
    loopback.
    """

    address: str = "127.0.0.1:9091"
    certs: Path | None = None
    insecure: bool = False

    def tls(self) -> ServerTls | None:
        """Return the server's certificates. Raises `ConfigError` when the directory lacks one."""
        if self.certs is None:
            return None
        for name in ("ca.pem", "server.pem", "server.key"):
            if not (self.certs / name).is_file():
                raise ConfigError(
                    f"--certs {self.certs} has no {name}; make it with: turnout certs init {self.certs}"
                )
        return ServerTls(
            self.certs / "server.pem", self.certs / "server.key", client_ca=self.certs / "ca.pem"
        )

    def check(self) -> None:
        """Raise `ConfigError` or `AddressError` for an address that cannot be used, before a run is made."""
        host, colon, port = self.address.rpartition(":")
        if not colon or not host or not port.isdecimal() or int(port) > 65_535:
            raise ConfigError(f"--address {self.address!r}: write HOST:PORT, for example 127.0.0.1:9091.")
        if self.certs is None and not self.insecure and not is_loopback(self.address):
            raise ConfigError(
                f"--address {self.address} can be reached from other machines: give certificates (--certs "
                "DIR, made by turnout certs init), or say --insecure to send models in plain text."
            )
        self.tls()
        _try_address(self.address, host.strip("[]"), int(port))


class ServedGrid(FleetGrid):
    """The grid of a served run; ``idle`` while it waits for clients, when nothing can be lost by stopping.

    ``num_clients`` is the number of clients that the experiment has, whether they have come or not.
    """

    def __init__(
        self,
        server: FleetServer,
        experiment: Experiment,
        num_clients: int,
        participation: ParticipationModel,
    ) -> None:
        fleet = experiment.fleet
        planned = fleet.participation == "experiment"
        super().__init__(
            server,
            min_clients=fleet.min_clients,
            wait=fleet.wait,
            participation=participation if planned else None,
            eligible=fleet.eligible,
        )
        self.num_clients = num_clients
        self.planned = planned
        self.idle = False
        self.on_idle: Callable[[], None] = lambda: None

    def registered_ids(self) -> Sequence[int]:  # type: ignore[override]
        """Return the ids of all clients of the experiment; of those enrolled in a live fleet."""
        return range(self.num_clients) if self.planned else super().registered_ids()

    def start_round(self, server_round: int) -> None:
        """Wait for the round's clients. Raises `QuorumMissed` when too few come in time."""
        with self._waiting():
            super().start_round(server_round)

    def get_node_ids(self) -> list[int]:
        """Return the round's clients; waits for those that left since it began. Raises `QuorumMissed`."""
        with self._waiting():
            return super().get_node_ids()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self.idle = True
        try:
            self.on_idle()
            yield
        except ConfigError as error:
            raise QuorumMissed(f"fleet.wait is over: {error}") from error
        finally:
            self.idle = False


class Served:
    """The parts of one served run, made when they are needed.

    Of a run that is resumed, nothing that needs PyTorch is made before the first round is out.
    """

    def __init__(self, experiment: Experiment, directory: Path | None, num_clients: int | None) -> None:
        self.experiment = experiment
        self._directory = directory
        self._num_clients = num_clients

    @cached_property
    def task(self) -> Task:
        """The task with its data: PyTorch, and seconds for large data."""
        return make_task(self.experiment)

    @property
    def data(self) -> Task | None:
        """The task, if the server has its data; None when only the clients have."""
        return None if self.experiment.task.name == EXTERNAL else self.task

    @cached_property
    def num_clients(self) -> int:
        """How many clients the experiment has."""
        return self.task.num_clients if self._num_clients is None else self._num_clients

    @cached_property
    def participation(self) -> ParticipationModel:
        """Who takes part when."""
        experiment, model = self.experiment, None
        if self._directory is not None:
            seed = experiment.run.seed
            model = read_participation(self._directory, experiment.participation, self.num_clients, seed)
        return make_participation(experiment, self.task) if model is None else model

    @cached_property
    def strategy(self) -> StreamingStrategy:
        """The strategy, new."""
        return make_strategy(self.experiment, self.num_clients, self.participation, lambda: self.task)

    @cached_property
    def initial(self) -> ArrayRecord:
        """The initial model."""
        kept = None if self._directory is None else read_initial(self._directory)
        return self.task.initial_arrays() if kept is None else kept


@dataclass(frozen=True)
class Opened:
    """A run whose server listens: what a caller may show, watch or measure while it goes on."""

    recorder: RunRecorder
    server: FleetServer
    grid: ServedGrid
    strategy: StreamingStrategy


Beside = Callable[[Opened], AbstractContextManager[Sequence[Callback]]]


def serve(
    experiment: Experiment,
    deployment: Deployment,
    *,
    resume: str | Path | None = None,
    store: RunStore | None = None,
    beside: Beside,
    plots: bool = True,
) -> RunSummary:
    """Run ``experiment`` on the clients that connect, and record it in ``store`` (default: its own).

    ``beside`` is entered once the server listens, and gives further callbacks, which see each round
    when it is committed and the clients were told. ``resume`` continues a run after its last checkpoint.
    An exception ends the run, which can then be resumed, and tells the nodes to come back; KeyboardInterrupt
    marks it interrupted.

    Raises `ConfigError` for what cannot be run or resumed, `AddressError`, `QuorumMissed`, and what a
    simulation raises.
    """
    deployment.check()
    if resume is None:
        # Whatever can fail fails before there is a run, or a store.
        parts = Served(experiment, None, None)
        _ = parts.initial, parts.participation, parts.strategy
        with nullcontext(store) if store is not None else open_store(experiment) as opened:
            return _go_on(parts, deployment, opened, _create(parts, opened), None, beside, plots)
    with nullcontext(store) if store is not None else open_store(experiment) as opened:
        row = find_run(opened, resume)
        if row.status == "finished" and experiment.run.rounds <= row.num_rounds:
            raise ConfigError(
                f"run {row.id} is finished after {row.num_rounds} rounds; to go on, give it more: "
                f"--set run.rounds={2 * row.num_rounds}"
            )
        recorder, checkpoint = resume_recorder(experiment, opened, row)
        parts = Served(experiment, recorder.directory.path, row.num_clients)
        return _go_on(parts, deployment, opened, recorder, checkpoint, beside, plots)


def _go_on(
    parts: Served,
    deployment: Deployment,
    store: RunStore,
    recorder: RunRecorder,
    checkpoint: dict[str, Any] | None,
    beside: Beside,
    plots: bool,
) -> RunSummary:
    with recorder:
        server = _server(parts, deployment, recorder)
        try:
            _run(parts, server, recorder, checkpoint, beside)
        except BaseException:
            server.stop(reconnect=True)  # The run is not over: nodes come back when it is resumed.
            raise
        server.stop()
    if plots:
        from turnout.experiment.recorded import plot_recorded

        plot_recorded(store, recorder, parts.data, parts.participation.rates)
    return RunSummary.of(recorder)


def _create(parts: Served, store: RunStore) -> RunRecorder:
    """Make the run, and keep what a resumed server will need of it."""
    recorder = create_recorder(parts.experiment, store, num_clients=parts.num_clients)
    try:
        keep_initial(recorder.directory.path, parts.initial)
        keep_participation(recorder.directory.path, parts.experiment.participation, parts.participation)
    except BaseException as error:
        recorder.__exit__(type(error), error, None)
        raise
    return recorder


def _server(parts: Served, deployment: Deployment, recorder: RunRecorder) -> FleetServer:
    experiment, fleet = parts.experiment, parts.experiment.fleet
    server = FleetServer(
        deployment.address,
        run=recorder.run.id,
        directory=recorder.directory.path,
        num_clients=parts.num_clients,
        run_config={"seed": experiment.run.seed, "experiment": for_clients(experiment)},
        tls=deployment.tls(),
        insecure=deployment.insecure,
        options=FleetOptions(
            upload_slots=fleet.upload_slots,
            deadline=fleet.deadline,
            quorum=fleet.quorum,
            enough=fleet.enough,
            reconnect=fleet.reconnect,
            stall=fleet.stall,
            min_rate=fleet.min_rate,
            max_reply_bytes=fleet.max_reply_bytes,
            same_identity=fleet.same_identity,
            max_offences=fleet.max_offences,
        ),
    )
    try:
        return server.start()
    except ConfigError as error:
        raise AddressError(str(error)) from error


def _run(
    parts: Served,
    server: FleetServer,
    recorder: RunRecorder,
    checkpoint: dict[str, Any] | None,
    beside: Beside,
) -> None:
    experiment = parts.experiment
    grid = ServedGrid(server, experiment, parts.num_clients, parts.participation)
    commit = CommitCallback(grid, every=experiment.run.checkpoint_every)
    with beside(Opened(recorder, server, grid, parts.strategy)) as callbacks:
        parts.strategy.start(
            grid,
            parts.initial,
            num_rounds=experiment.run.rounds,
            timeout=experiment.fleet.timeout,
            evaluate_fn=evaluation(experiment, lambda: parts.data, recorder),
            resume_from=checkpoint,
            callbacks=[recorder, commit, *callbacks],
        )


def for_clients(experiment: Experiment) -> str:
    """Return the part of the experiment that clients compute, as TOML; nothing of where the server keeps it.

    Empty for clients that bring an app of their own.
    """
    if experiment.task.name == EXTERNAL:
        return ""
    whole = experiment.resolved()
    shared: dict[str, Any] = {
        name: whole[name] for name in ("task", "peft", "client", "link") if name in whole
    }
    return tomli_w.dumps({"run": {"seed": experiment.run.seed}, **shared})


def _try_address(address: str, host: str, port: int) -> None:
    """Raise `AddressError` unless ``address`` can be listened on now."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, place in found:
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                trial.bind(place)
    except OSError as error:
        raise AddressError(
            f"--address {address} cannot be used: {error.strerror or error}. Choose another, or stop the "
            "process that has it."
        ) from error
