"""``turnout server``: run an experiment on the clients that connect."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from turnout.cli.dashboard import beside_run
from turnout.cli.metrics import MetricsAddress, MetricsOpen, MetricsOptions, MetricsPort, metrics_endpoint
from turnout.cli.output import REFUSED, TARGET_MISSED, Json, NoColor, Output, Quiet, Verbose
from turnout.cli.simulate import File, NoPlots, Set, finish_run
from turnout.cli.tracking import LogTo, tracking

if TYPE_CHECKING:
    from turnout.cli.stopping import StopSignals
    from turnout.experiment import Experiment
    from turnout.experiment.recorded import RunSummary
    from turnout.experiment.serve import Deployment, Opened
    from turnout.server.store import RunStore
    from turnout.strategies import Callback
    from turnout.wire import ConfigError

Address = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT", envvar="TURNOUT_SERVER_ADDRESS", help="Where to listen; port 0 is any free one."
    ),
]
Certs = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        envvar="TURNOUT_CERTS",
        help="Certificates of `turnout certs`: TLS both ways, and a client's name is its certificate's.",
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure", envvar="TURNOUT_INSECURE", help="Plain text beyond this machine: anyone can read along."
    ),
]
EnrolAddress = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        envvar="TURNOUT_ENROL_ADDRESS",
        help="With --certs: where nodes fetch certificates for tokens (`turnout enrol`).",
    ),
]
DashboardAddress = Annotated[
    str | None,
    typer.Option(
        "--dashboard",
        metavar="HOST:PORT",
        envvar="TURNOUT_DASHBOARD_ADDRESS",
        help="Serve the dashboard of the run's store.",
    ),
]
DashboardToken = Annotated[
    Path | None,
    typer.Option(
        "--dashboard-token-file",
        metavar="FILE",
        envvar="TURNOUT_DASHBOARD_TOKEN_FILE",
        help="File (mode 0600) with the token that the dashboard's readers need.",
    ),
]
Store = Annotated[
    str,
    typer.Option(
        envvar="TURNOUT_STORE",
        help="With --resume and no FILE, where the run is: a directory, an SQLite file or a database URL.",
    ),
]
PerClientMetrics = Annotated[
    bool,
    typer.Option(
        "--per-client-metrics",
        envvar="TURNOUT_PER_CLIENT_METRICS",
        help="With metrics: gauges for every client, its number as label. For at most 200 clients.",
    ),
]

Resume = Annotated[
    str | None,
    typer.Option(
        metavar="RUN",
        help='Go on with a run: its id, its directory, or "last". With FILE, "auto" goes on with its newest '
        "run, or starts the first one: for containers and services.",
    ),
]
AUTO: Final = "auto"

DEFAULT_ADDRESS: Final = "127.0.0.1:9091"
_STOPS: Final = (signal.SIGINT, signal.SIGTERM)


def server(
    file: File = None,
    overrides: Set = None,
    resume: Resume = None,
    address: Address = DEFAULT_ADDRESS,
    certs: Certs = None,
    insecure: Insecure = False,
    metrics_address: MetricsAddress = None,
    metrics_port: MetricsPort = None,
    metrics_open: MetricsOpen = False,
    per_client_metrics: PerClientMetrics = False,
    enrol_address: EnrolAddress = None,
    dashboard_address: DashboardAddress = None,
    dashboard_token_file: DashboardToken = None,
    store: Store = "runs",
    no_plots: NoPlots = False,
    log_to: LogTo = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Run an experiment on the clients that connect (`turnout client`), and record it.

    SIGTERM ends the run when its round is committed and exits with 0; --resume goes on with it.
    """
    with Output(quiet=quiet, verbose=verbose, no_color=no_color, as_json=as_json) as output:
        from turnout.cli.stopping import StopSignals, Terminated
        from turnout.experiment.serve import AddressError, Deployment, QuorumMissed

        deployment = Deployment(address=address, certs=certs, insecure=insecure)
        # Who said that models may travel in plain text has said so of numbers about them.
        metrics = MetricsOptions(metrics_address, metrics_port, open=metrics_open or insecure)
        served = beside_run(dashboard_address, dashboard_token_file, output)
        with StopSignals(_STOPS) as stop:
            try:
                run = _Run(output, stop, file, deployment, metrics, enrol_address, served)
                run.per_client, run.log_to = per_client_metrics, log_to or []
                reached = run.go(overrides or [], resume, store, plots=not no_plots)
            except AddressError as error:
                raise output.failure(error, REFUSED) from error
            except QuorumMissed as error:
                raise output.failure(error, TARGET_MISSED) from error
            except Terminated:
                output.say(f"Stopped in good order. {output.resume_hint}", markup=False, soft_wrap=True)
                raise typer.Exit from None
        if not reached:
            raise typer.Exit(TARGET_MISSED)


class _Run:
    """One served run as the terminal shows it."""

    def __init__(
        self,
        output: Output,
        stop: StopSignals,
        file: Path | None,
        deployment: Deployment,
        metrics: MetricsOptions,
        enrol_address: str | None,
        dashboard: AbstractContextManager[Callable[[RunStore], None]],
    ) -> None:
        self.dashboard = dashboard
        self.output, self.stop, self.file = output, stop, file
        self.deployment, self.metrics, self.enrol_address = deployment, metrics, enrol_address
        self.per_client = False
        self.log_to: list[str] = []

    def go(self, overrides: list[str], resume: str | None, location: str, *, plots: bool) -> bool:
        """Run it, show its table, and return whether its target (if it has one) was reached."""
        from turnout.experiment.recorded import open_store

        self.stop.idle = lambda: True  # Nothing can be lost before there is a run.
        self.deployment.check()
        with self.output.working("Reading the experiment"):
            self.experiment, store = _open(self.file, overrides, resume, location)
        self.stop.idle = lambda: False
        if resume == AUTO:
            resume, over = _newest(self.experiment)
            if over:
                self.output.say(f"run {resume} is finished; there is nothing to do", markup=False)
                return True
        with ExitStack() as stack:
            if store is not None:
                stack.enter_context(store)
            summary = self._serve(store, resume, plots)
            self.output.resume_hint = ""
            store = stack.enter_context(open_store(self.experiment)) if store is None else store
            return finish_run(self.experiment, store, summary, self.output, file=self.file, plots=plots)

    def _serve(self, store: RunStore | None, resume: str | None, plots: bool) -> RunSummary:
        from turnout.cli.progress import RunProgress
        from turnout.experiment.serve import serve

        with (
            self._metrics() as watched,
            self._enrolment(),
            tracking(self.log_to, self.output) as trackers,
            self.dashboard as show_dashboard,
            RunProgress(self.output, [self.experiment.label], stop=self.stop) as progress,
        ):

            @contextmanager
            def beside(run: Opened) -> Iterator[Sequence[Callback]]:
                run.grid.on_idle, self.stop.idle = self.stop.check, lambda: run.grid.idle
                progress.begin(self.experiment.label, num_clients=run.grid.num_clients)
                self._introduce(run)
                show_dashboard(run.recorder.store)
                trackers.begin(run.recorder.run, run.recorder.directory.path)
                yield (*watched(run), trackers, progress)

            return serve(
                self.experiment, self.deployment, resume=resume, store=store, beside=beside, plots=plots
            )

    @contextmanager
    def _metrics(self) -> Iterator[Callable[[Opened], Sequence[Callback]]]:
        """Serve metrics, if asked to; give what makes a run's callbacks."""
        from turnout.wire import ConfigError

        with ExitStack() as stack:
            try:
                registry = stack.enter_context(metrics_endpoint(self.metrics, self.output))
            except ConfigError as error:
                raise _address_error(error) from error
            if registry is None:
                if self.per_client:
                    raise ConfigError("--per-client-metrics needs --metrics-address HOST:PORT.")
                yield lambda run: ()
                return
            from turnout.server.metrics import FleetCollector, MetricsCallback
            from turnout.wire.metrics_certificates import watch_certificates

            if (certs := self.deployment.certs) is not None:
                watch_certificates(registry, {"ca": certs / "ca.pem", "server": certs / "server.pem"})

            def watched(run: Opened) -> Sequence[Callback]:
                registry.register(FleetCollector(run.server))
                row = run.recorder.run
                return (
                    MetricsCallback(
                        registry,
                        run=row.id,
                        strategy=row.strategy,
                        recorder=run.recorder,
                        per_client=self.per_client,
                    ),
                )

            yield watched

    @contextmanager
    def _enrolment(self) -> Iterator[None]:
        """Sign certificates for tokens, if asked to."""
        if self.enrol_address is None:
            yield
            return
        from turnout.server.fleet.enrolment import EnrolmentServer
        from turnout.wire import ConfigError

        if self.deployment.certs is None:
            raise ConfigError(
                f"--enrol-address {self.enrol_address} needs --certs DIR, whose authority signs."
            )
        enrolment = EnrolmentServer(self.enrol_address, self.deployment.certs)
        try:
            enrolment.start()
        except ConfigError as error:
            raise _address_error(error) from error
        try:
            self.output.say(f"enrolment at {enrolment.address}", markup=False)
            yield
        finally:
            enrolment.stop()

    def _introduce(self, run: Opened) -> None:
        from turnout.cli.watch import FleetWatch

        recorder, clients = run.recorder, run.grid.num_clients
        row, label, output = recorder.run, self.experiment.label, self.output
        output.about["run"] = row.id
        output.resume_hint = f"Continue with: {self._resume_command(run)}"
        done = recorder.last_round
        again = f"continues after round {done}" if done else f"{row.num_rounds} rounds"
        lines = [
            f"run {row.id}: {label} on {row.task}, {clients} clients, {again}",
            f"listening on {run.server.address}{self._security()}",
            self._who_takes_part(),
            f"Clients: {self._client_command(run)}",
        ]
        for line in lines:
            output.say(line, markup=False, soft_wrap=True)
        FleetWatch(run.server, output, clients)

    def _resume_command(self, run: Opened) -> str:
        section, directory = self.experiment.run, run.recorder.directory.path
        if section.store is not None:  # Its address may hold a password: the file has it, if need be.
            which = f"{self.file or '--store STORE'} --resume {run.recorder.run.id}"
        else:
            local = directory.resolve().parent == Path("runs").resolve()
            which = f"--resume {run.recorder.run.id if local else directory}"
        where = f" --address {run.server.address}" if self.deployment.address != DEFAULT_ADDRESS else ""
        certs = f" --certs {self.deployment.certs}" if self.deployment.certs is not None else ""
        return f"turnout server {which}{where}{certs}{' --insecure' if self.deployment.insecure else ''}"

    def _security(self) -> str:
        return ", TLS both ways" if self.deployment.certs is not None else ", plain text"

    def _who_takes_part(self) -> str:
        fleet = self.experiment.fleet
        if fleet.participation == "live":
            return f"Whoever is connected takes part, from {fleet.min_clients} clients on."
        if self.experiment.participation.name == "always":
            return "Every client takes part in every round; a round waits for all."
        return (
            f"participation {self.experiment.participation.name} says who takes part in which round; a round "
            "waits for those clients."
        )

    def _client_command(self, run: Opened) -> str:
        command = f"turnout client --server {run.server.address} --clients 0-{run.grid.num_clients - 1}"
        if self.deployment.certs is not None:
            command += f" --certs {self.deployment.certs} --name NAME"
        elif self.deployment.insecure:
            command += " --insecure"
        return command + (" --app MODULE:ATTRIBUTE" if self.experiment.task.name == "external" else "")


def _address_error(error: ConfigError) -> Exception:
    """Return ``error``, as one of the address when it is not what was written that is wrong."""
    from turnout.experiment.serve import AddressError

    return AddressError(str(error)) if isinstance(error.__cause__, (OSError, RuntimeError)) else error


def _open(
    file: Path | None, overrides: list[str], resume: str | None, location: str
) -> tuple[Experiment, RunStore | None]:
    """Return the experiment: of the file, else of the run that is resumed, with the store that has it."""
    from turnout.experiment import Experiment, load_experiment
    from turnout.experiment.recorded import find_run
    from turnout.experiment.source import Source, apply_overrides
    from turnout.server.store import RunStore
    from turnout.wire import ConfigError

    if file is not None:
        return load_experiment(file, overrides), None
    if resume in (None, AUTO):
        raise ConfigError(
            "no experiment given: name a file, for example turnout server examples/digits.toml."
        )
    path = Path(resume)
    store = RunStore(path.parent if (path / "experiment.toml").is_file() else location, create=False)
    try:
        row = find_run(store, resume)
        if not overrides:
            return Experiment.from_stored(row.config, row.strategy), store
        data, source = apply_overrides(row.config, overrides, Source(f"run {row.id}"))
        return Experiment.from_dict(data, source=source), store
    except BaseException:
        store.close()
        raise


def _newest(experiment: Experiment) -> tuple[str | None, bool]:
    """Return the id of the newest run with the experiment's name, if any, and whether it is over."""
    from turnout.experiment.recorded import open_store

    with open_store(experiment) as store:
        for row in store.runs():
            if row.name == experiment.run.name:
                return row.id, row.status == "finished" and experiment.run.rounds <= row.num_rounds
    return None, False
