"""The builder of Turnout's Flower ``ClientApp``."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from turnout.allocation import KeptPart, narrowed
from turnout.client.curvature import curvature_record
from turnout.client.examples import client_examples
from turnout.client.flat_model import FlatModel, to_vector
from turnout.client.local_round import LocalRound
from turnout.client.local_updates import FULL_PRECISION, LOCAL_MODELS, OWN_START, LocalUpdate
from turnout.client.options import Precision, Reference, ReplyForm, TrainOptions
from turnout.client.round_optimizer import RoundOptimizer
from turnout.client.shared_state import SharedStates
from turnout.client.state import ClientState
from turnout.client.work import Outcome
from turnout.optim import StatePolicy
from turnout.tasks.task import ClientData, Task
from turnout.tasks.validation import check_number
from turnout.wire import keys
from turnout.wire.arrays import view
from turnout.wire.errors import ConfigError, LayoutError, unknown_name
from turnout.wire.layout import ParameterLayout
from turnout.wire.registry import find

_LR: Final = "lr"
_log = logging.getLogger(__name__)


def client_app(
    task: Task,
    *,
    optimizer: str = "sgd",
    optimizer_options: Mapping[str, Any] | None = None,
    optimizer_state: StatePolicy = "reset",
    reply: ReplyForm = "dense",
    lr: float = 0.1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    batch_size: int = 32,
    local_steps: int | None = None,
    local_epochs: int | None = None,
    anchor_batch_size: int | None = None,
    reference: Reference = "telescoped",
    closed_form: bool = True,
    precision: Precision = "float32",
    seed: int = 0,
    device: str = "auto",
    mods: Sequence[Mod] = (),
) -> TaskApp:
    """Return a Flower ``ClientApp`` whose clients train on ``task``.

    The app answers ``train`` (the local update that the request's config names), ``evaluate`` (the received
    model on the client's own data), ``query.local_model`` (the model that an ADMM client keeps, after
    the request's ``server-round``; nothing changes) and ``query.curvature`` (statistics of the received
    model's layers for a weight edit). A client is ``partition-id`` of its node config, else
    its node id. A request's config may carry ``lr`` for a schedule decided by the server; it replaces
    ``lr`` for that round.

    The settings are those of `TrainOptions`; bad ones raise `ConfigError` here. Bad requests raise
    `ConfigError` or `LayoutError`, a client without examples `DataError`: the engine reports them as that
    client's failure. The app may be called from several threads at once, each trains a model of its own;
    the same (seed, client, round, request, state) gives the same reply, bit for bit on one machine.
    """
    options = TrainOptions(
        optimizer=optimizer,
        optimizer_options=dict(optimizer_options or {}),
        optimizer_state=optimizer_state,
        reply=reply,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        batch_size=batch_size,
        local_steps=local_steps,
        local_epochs=local_epochs,
        anchor_batch_size=anchor_batch_size,
        reference=reference,
        closed_form=closed_form,
        precision=precision,
        seed=seed,
        device=device,
    )
    if reply == "coded" and mods:
        raise ConfigError(
            "reply='coded' is what clients and server make of the same numbers, which mods (a link) may "
            "change or must read; use reply='dense', or no mods."
        )
    if options.warning is not None:
        _log.warning("optimizer %r: %s", options.optimizer, options.warning)
    return TaskApp(Trainer(task, options), mods)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks of a client: the local update of a round, its learning rate, further numbers."""

    server_round: int
    local_update: str
    lr: float
    config: ConfigRecord


class TaskApp(ClientApp):
    """The app that `client_app` makes. ``trainer`` does its work; ``bare`` says that it has no mods."""

    def __init__(self, trainer: Trainer, mods: Sequence[Mod] = ()) -> None:
        super().__init__(mods=list(mods))
        self.trainer = trainer
        self.bare = not mods
        self.train()(trainer.train)
        self.evaluate()(trainer.evaluate)
        self.query("local_model")(trainer.local_model)
        self.query("curvature")(trainer.curvature)


class Trainer:
    """Answers messages for every client of ``task`` in this process; one `FlatModel` per thread."""

    def __init__(self, task: Task, options: TrainOptions) -> None:
        self.task = task
        self.options = options
        self._device = options.resolved_device
        self._local = threading.local()
        self._shared = SharedStates()
        self._on_device: dict[int, ClientData] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"task": self.task, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["task"], state["options"])  # type: ignore[misc]

    @property
    def on_cpu(self) -> bool:
        """Whether clients train on a CPU."""
        return torch.device(self._device).type == "cpu"

    def train(self, message: Message, context: Context) -> Message:
        """Run the local update that the request names and reply with its records and metrics."""
        started = time.perf_counter()
        work, outcome = self.update(message.content, context)
        layout, content = work.model.layout, RecordDict()
        for key, value in outcome.vectors.items():
            vector = to_vector(value) if isinstance(value, torch.Tensor) else value
            # The model takes its buffers along; a gradient or a control variate has none.
            if key == keys.ARRAYS:
                content[key] = work.model.record(vector)
            else:
                trimmed = key.startswith(f"{keys.OPTIMIZER}.") or work.flag(keys.PARTIAL)
                content[key] = layout.record(vector, trimmed=trimmed)
        if work.flag(keys.PARTIAL) and isinstance(sent := content.get(keys.ARRAYS), ArrayRecord):
            received = _arrays(message.content)
            content[keys.ARRAYS] = _changed(sent, layout, received, work.model.parts.kept(received))
        if isinstance(sent := content.get(keys.ARRAYS), ArrayRecord):
            _put_codes(sent, layout, outcome.codes)
        for key, record in outcome.records.items():
            content[key] = record
        content[keys.METRICS] = MetricRecord(
            {
                keys.NUM_EXAMPLES: len(work.data),
                keys.CLIENT_ID: work.client,
                keys.TRAIN_LOSS: float(outcome.train_loss),
                keys.TRAIN_SECONDS: time.perf_counter() - started,
                **outcome.metrics,
            }
        )
        return Message(content, reply_to=message)

    def update(self, content: RecordDict, context: Context) -> tuple[LocalRound, Outcome]:
        """Run the local update that a request's ``content`` names; return the work and what came of it."""
        work = self._local_round(content, context)
        if self.options.precision != "float32" and work.local_update in FULL_PRECISION:
            raise ConfigError(
                f"precision={self.options.precision!r} is not possible with local update "
                f"{work.local_update!r}; use 'float32'."
            )
        update = cast(LocalUpdate, find("local-update", work.local_update).target)
        outcome = update(work)
        outcome.vectors |= work.optimizer.commit()
        if self.options.reply == "coded":
            received = work.model.layout.flatten(_arrays(content))
            outcome.codes = work.optimizer.codes(received, outcome.vectors.get(keys.ARRAYS))
        return work, outcome

    def evaluate(self, message: Message, context: Context) -> Message:
        """Reply the task's metrics of the received model on the client's own examples."""
        client = self._client(context)
        data = self._data(client)
        model = self._model()
        self._shared.apply(message.content, context, model)
        model.load(_arrays(message.content))
        metrics: dict[str, int | float] = dict(self.task.evaluate_model(model.module, data))
        metrics |= {keys.NUM_EXAMPLES: len(data), keys.CLIENT_ID: client}
        return Message(RecordDict({keys.METRICS: MetricRecord(cast(Any, metrics))}), reply_to=message)

    def local_model(self, message: Message, context: Context) -> Message:
        """Reply the model that the client keeps, as it stands after the request's round."""
        work = self._local_round(message.content, context)
        if work.local_update not in LOCAL_MODELS:
            raise unknown_name("local update with a local model", work.local_update, LOCAL_MODELS)
        vector = LOCAL_MODELS[work.local_update](work)
        metrics = MetricRecord({keys.NUM_EXAMPLES: len(work.data), keys.CLIENT_ID: work.client})
        content = RecordDict({keys.ARRAYS: work.model.record(vector), keys.METRICS: metrics})
        return Message(content, reply_to=message)

    def curvature(self, message: Message, context: Context) -> Message:
        """Reply the curvature statistics of the received model's layers on the client's own examples."""
        client = self._client(context)
        data = self._data(client)
        model = self._model()
        model.load(_arrays(message.content))
        config = message.content.get(keys.CONFIG)
        record = curvature_record(model, self.task, data, config, (self.options.seed, client))
        metrics = MetricRecord({keys.NUM_EXAMPLES: len(data), keys.CLIENT_ID: client})
        return Message(RecordDict({keys.CURVATURE: record, keys.METRICS: metrics}), reply_to=message)

    def _local_round(self, content: RecordDict, context: Context) -> LocalRound:
        client = self._client(context)
        data = self._data(client)
        asked = self.asked(content)
        model = self._model()
        self._shared.apply(content, context, model)
        if asked.local_update not in OWN_START or keys.ARRAYS in content:
            model.load(_arrays(content))
        return LocalRound(
            client=client,
            server_round=asked.server_round,
            local_update=asked.local_update,
            model=model,
            task=self.task,
            data=self.task.examples_at(data, asked.server_round),
            options=self.options,
            lr=asked.lr,
            config=asked.config,
            content=content,
            state=ClientState(context.state, asked.local_update, asked.server_round),
            optimizer=RoundOptimizer(
                self.options,
                context.state,
                client,
                asked.server_round,
                self._steps(data),
                asked.config,
            ),
        )

    def _steps(self, data: ClientData) -> int:
        """Return how many steps one local training on ``data`` takes."""
        o = self.options
        if o.local_steps is not None:
            return o.local_steps
        return (o.local_epochs or 1) * -(-len(data) // o.batch_size)

    def asked(self, content: RecordDict) -> Asked:
        """Return what a request asks for; raises `ConfigError` for an impossible round or learning rate."""
        config = content.get(keys.CONFIG)
        if not isinstance(config, ConfigRecord):
            config = ConfigRecord()
        server_round = config.get(keys.SERVER_ROUND)
        if not isinstance(server_round, int) or isinstance(server_round, bool) or server_round < 0:
            raise ConfigError(
                f"{keys.SERVER_ROUND}={server_round!r} in the request's config is not possible; "
                "the strategy must send the round, a whole number."
            )
        lr = config.get(_LR, self.options.lr)
        check_number(_LR, lr, low=0, open_low=True)
        # Flower's own strategies name no local update; its FedProx is known by its coefficient.
        plain = "prox" if keys.PROXIMAL_MU in config else "sgd"
        local_update = str(config.get(keys.LOCAL_UPDATE, plain))
        return Asked(server_round, local_update, cast(float, lr), config)

    def _model(self) -> FlatModel:
        model = getattr(self._local, "model", None)
        if model is None:
            model = self._local.model = FlatModel(self.task.seeded_model(0), self._device)
        return cast(FlatModel, model)

    def _client(self, context: Context) -> int:
        client = context.node_config.get("partition-id", context.node_id)
        if not isinstance(client, int) or not 0 <= client < self.task.num_clients:
            raise ConfigError(
                f"partition-id={client!r} is not a client of task {self.task.name!r}; use 0 to "
                f"{self.task.num_clients - 1} (the node id is used when the node config has no partition-id)."
            )
        return client

    def _data(self, client: int) -> ClientData:
        data = self._on_device.get(client)
        if data is None:
            data = client_examples(self.task, client, self._device)
            if not self.on_cpu:  # Else the task keeps what it wants to keep.
                self._on_device[client] = data
        return data


def _changed(
    sent: ArrayRecord, layout: ParameterLayout, received: ArrayRecord, kept: Mapping[str, KeptPart]
) -> ArrayRecord:
    """Return ``sent`` without the parameters that are, bit for bit, those ``received``.

    One stays if all are: a model without parameters is none. Of those in ``kept`` there is that part only:
    what became of the rest is nobody's concern.
    """
    made, before = narrowed(sent, kept), narrowed(received, kept)
    parameters = [spec.name for spec in layout.tensors if spec.name in made]
    same = [name for name in parameters if np.array_equal(view(made[name]), view(before[name]))]
    for name in same[len(same) == len(parameters) :]:
        del made[name]
    return made


def _put_codes(sent: ArrayRecord, layout: ParameterLayout, codes: Mapping[int, Array]) -> None:
    """Put ``codes``, by the offsets of their tensors, into the places of what is ``sent`` whole."""
    for spec in layout.tensors if codes else ():
        if spec.offset in codes and spec.name in sent and tuple(sent[spec.name].shape) == spec.shape:
            sent[spec.name] = codes[spec.offset]


def _arrays(content: RecordDict) -> ArrayRecord:
    record = content.get(keys.ARRAYS)
    if not isinstance(record, ArrayRecord):
        raise LayoutError(
            f"the request brings no record {keys.ARRAYS!r}; the strategy must send the model in it."
        )
    return record
