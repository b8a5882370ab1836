"""Edit the model of a finished run by loss curvature: statistics from its clients, an edit, a new file.

The clients are simulated, from the run's own experiment, or those of a fleet that connect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from turnout.experiment.build import make_app, make_task
from turnout.experiment.model import Experiment, load_experiment
from turnout.experiment.serve import Deployment, for_clients
from turnout.server.documents import json_document, write_atomically
from turnout.server.recorder import model_sha256
from turnout.server.run_directory import RunDirectory, new_run_id
from turnout.server.schema import RunRow
from turnout.strategies.loss_curvature_edit import Edited, edit_arrays, gather_curvature, weight_shapes
from turnout.wire import ConfigError, keys
from turnout.wire.flower import records_of, request
from turnout.wire.model_file import model_bytes, read_model

if TYPE_CHECKING:
    from turnout.tasks import Task

Values = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """What is edited and how; see `turnout.strategies.loss_curvature_edit`.

    ``layers`` by name; empty takes every matrix but the first and the last one. ``timeout`` in seconds, for
    each question to the clients.
    """

    rho: tuple[float, ...] = (0.95,)
    layers: tuple[str, ...] = ()
    labels: Literal["dataset", "sampled", "expected"] = "dataset"
    weighting: Literal["examples", "balanced"] = "examples"
    timeout: float = 3600.0


@dataclass(frozen=True)
class Judged:
    """A model's ``metrics`` on held-out data, and by client its accuracy (or loss) on its own examples."""

    metrics: Values
    clients: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EditedModel:
    """The outcome for one ``rho``; ``path`` is the file."""

    rho: float
    layers: dict[str, Edited]
    judged: Judged
    sha256: str
    path: Path


@dataclass(frozen=True)
class EditReport:
    """All outcomes, the model before, and why the statistics of some clients are missing."""

    run_id: str
    examples: int
    before: Judged
    edited: list[EditedModel]
    missing: dict[int, str]

    def document(self) -> dict[str, Any]:
        """Return the report as it is written beside the models, and as ``--json`` prints it."""

        def judged(model: Judged) -> dict[str, Any]:
            return {"metrics": model.metrics, "clients": {str(k): v for k, v in model.clients.items()}}

        return {
            "run_id": self.run_id,
            "examples": self.examples,
            "before": judged(self.before),
            "edits": [
                {
                    "rho": e.rho,
                    "layers": {n: {"kept": x.kept, "energy": x.energy} for n, x in e.layers.items()},
                    **judged(e.judged),
                    "model_sha256": e.sha256,
                    "file": str(e.path),
                }
                for e in self.edited
            ],
            "missing": {str(client): reason for client, reason in self.missing.items()},
        }


def edit_run(
    row: RunRow,
    directory: Path,
    options: EditOptions,
    *,
    deployment: Deployment | None = None,
    waiting: Callable[[str], None] = lambda address: None,
) -> EditReport:
    """Edit the final model of the run in ``directory`` once for each rho, and judge the results.

    Without ``deployment`` the clients are simulated; with it, a server waits there for all clients of the run
    (``waiting`` is called with its address). Writes ``model/edited-RHO.safetensors`` and ``model/edit.json``.

    Raises `ConfigError` for a run without a final model and for impossible options.
    """
    for rho in options.rho:
        if not 0 <= rho <= 1:
            raise ConfigError(f"rho={rho!r} is not possible; use numbers from 0 to 1, for example 0.95.")
    run = RunDirectory(directory)
    # A run that was given more rounds and stopped has the model of before.
    if row.status != "finished" or not run.model_file.is_file():
        raise ConfigError(
            f"run {row.id} has no final model yet; finish it first (turnout simulate --resume {row.id})."
        )
    experiment = load_experiment(run.experiment_file)
    external = experiment.task.name == "external"
    if external and deployment is None:
        raise ConfigError(
            f"run {row.id} has clients with data of their own; give --address, and let them connect to it."
        )
    task = None if external else make_task(experiment)
    arrays = _in_order(read_model(run.model_file), task)
    layers = options.layers or _hidden(arrays)
    weight_shapes(arrays, layers)  # A mistake is told before anybody is asked.
    with _clients(experiment, task, row.num_clients, deployment, waiting) as grid:
        sums, missing = gather_curvature(
            grid, arrays, layers, labels=options.labels, weighting=options.weighting, timeout=options.timeout
        )
        factors = sums.factors()
        before = _judge(grid, task, arrays, options.timeout)
        edited = []
        for rho in options.rho:
            model, changed = edit_arrays(arrays, factors, rho)
            path = run.model_file.with_name(f"edited-{rho:g}.safetensors")
            write_atomically(path, model_bytes(model))
            judged = _judge(grid, task, model, options.timeout)
            edited.append(EditedModel(rho, changed, judged, model_sha256(model), path))
    report = EditReport(row.id, sums.examples, before, edited, missing)
    write_atomically(run.model_file.with_name("edit.json"), json_document(report.document()))
    return report


def _in_order(arrays: ArrayRecord, task: Task | None) -> ArrayRecord:
    """Return the arrays in the model's own order, which the run's file does not keep."""
    names = list(arrays if task is None else task.initial_arrays())
    if sorted(names) != sorted(arrays):
        raise ConfigError(
            "the run's model is not of its task any more: the task's model has other names now."
        )
    record = ArrayRecord()
    for name in names:
        record[name] = arrays[name]
    return record


def _hidden(arrays: ArrayRecord) -> tuple[str, ...]:
    """Return the layers between the first and the last matrix: these can be edited with least harm."""
    names = [
        n.removesuffix(".weight")
        for n, a in arrays.items()
        if n.endswith(".weight") and len(a.shape) in (2, 4)
    ]
    if not names[1:-1]:
        raise ConfigError(
            f"the model has no layer between its first and last ({', '.join(names) or 'it has none'}); name "
            "layers with --layers."
        )
    return tuple(names[1:-1])


@contextmanager
def _clients(
    experiment: Experiment,
    task: Task | None,
    num_clients: int,
    deployment: Deployment | None,
    waiting: Callable[[str], None],
) -> Iterator[Grid]:
    """Yield a grid on which all clients of the run can be asked."""
    if deployment is None:
        from turnout.simulation import LocalGrid

        assert task is not None
        yield LocalGrid(make_app(experiment, task), num_clients, seed=experiment.run.seed)
        return
    from turnout.server.fleet import FleetGrid, FleetServer

    deployment.check()
    server = FleetServer(
        deployment.address,
        run=new_run_id(),
        num_clients=num_clients,
        run_config={"seed": experiment.run.seed, "experiment": for_clients(experiment)},
        tls=deployment.tls(),
        insecure=deployment.insecure,
    )
    with server:
        waiting(server.address)
        yield FleetGrid(server, min_clients=num_clients, wait=experiment.fleet.wait)


def _judge(grid: Grid, task: Task | None, arrays: ArrayRecord, timeout: float) -> Judged:
    content = RecordDict({keys.ARRAYS: arrays, keys.CONFIG: ConfigRecord({keys.SERVER_ROUND: 1})})
    messages = [
        request(content, dst_node_id=node, message_type=MessageType.EVALUATE)
        for node in sorted(grid.get_node_ids())
    ]
    clients: dict[int, float] = {}
    for reply in grid.send_and_receive(messages, timeout=timeout):
        if reply.has_error():
            continue
        for record in records_of(reply.content, MetricRecord).values():
            found = _main_value(record)
            if found is not None:
                clients[reply.metadata.src_node_id] = found
    return Judged({} if task is None else task.evaluate(arrays), dict(sorted(clients.items())))


def _main_value(metrics: Mapping[str, Any]) -> float | None:
    for name in ("accuracy", "loss"):
        if isinstance(metrics.get(name), (int, float)):
            return float(metrics[name])
    return None


def layer_table(edited: Sequence[EditedModel]) -> list[tuple[str, str, str, str]]:
    """Return (rho, layer, share of components kept, share of the squared norm kept) as text, row by row."""
    return [
        (f"{model.rho:g}", name, f"{100 * layer.kept:.3g} %", f"{100 * layer.energy:.3g} %")
        for model in edited
        for name, layer in model.layers.items()
    ]
