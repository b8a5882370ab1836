"""The batched trainer: cuts a cohort into chunks of like clients and runs the local update on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import torch
from flwr.app import RecordDict
from torch import Tensor, nn

from turnout.client.batched.batches import ClientExamples, Examples, Kind
from turnout.client.batched.cohort import CohortOutcome, CohortWork
from turnout.client.batched.cohort_round import CohortRound
from turnout.client.batched.cohort_state import CohortState
from turnout.client.batched.engine import Engine, choose_engine
from turnout.client.batched.layered_engine import LayeredEngine
from turnout.client.batched.stacked_model import StackedModel
from turnout.client.examples import client_examples
from turnout.client.flat_model import FlatModel, to_vector
from turnout.client.local_round import LocalRound
from turnout.client.local_updates import LocalUpdate, admm, anchor, dual_admm, dyn, miner, prox, scaffold, sgd
from turnout.client.options import TrainOptions
from turnout.client.round_optimizer import RoundOptimizer
from turnout.client.state import ClientState
from turnout.client.work import Outcome, WorkState
from turnout.tasks.task import Task, Vector
from turnout.wire import keys
from turnout.wire.arrays import NDArray
from turnout.wire.errors import LayoutError
from turnout.wire.registry import find

LOCAL_UPDATES: Final[dict[str, LocalUpdate]] = {
    "admm": admm.admm,
    "anchor": anchor.anchor,
    "dual-admm": dual_admm.dual_admm,
    "dyn": dyn.dyn,
    "miner": miner.miner,
    "prox": prox.prox,
    "scaffold": scaffold.scaffold,
    "sgd": sgd.sgd,
}
# Optimizers that treat each number of a vector by itself, so that a stack of clients is one tensor to them.
_ELEMENTWISE: Final = frozenset(
    {"adadelta", "adagrad", "adam", "adamax", "adamw", "asgd", "nadam", "radam", "rmsprop", "rprop", "sgd"}
)
# How many clients at once. On a CPU their parameters, and what a step makes of a batch, should stay in the
# cache while there are enough of them to share the cost of each call; on a GPU memory is the limit.
_CPU_PARAMETERS: Final = 1 << 20
_CPU_NUMBERS: Final = 1 << 20
_CPU_CLIENTS: Final = 256
_CPU_FEW: Final = 4
_CUDA_NUMBERS: Final = 1 << 29
_CUDA_CLIENTS: Final = 1024


@dataclass(frozen=True, slots=True)
class _Member:
    """A client of the call: its position there, its examples, and what it keeps."""

    position: int
    examples: ClientExamples
    kept: dict[str, Vector]


class BatchedTrainer:
    """Trains the clients of ``task`` many at a time, on one device. Not for use by two threads at once.

    ``device`` overrides that of the options. Every result is the serial trainer's up to rounding (1e-5
    relative in float32), whoever else is in the call.
    """

    def __init__(self, task: Task, options: TrainOptions, device: str | None = None) -> None:
        self.task = task
        self.options = options
        self.device = torch.device(device or options.resolved_device)
        self._unfit = _unfit(task.seeded_model(0))
        self._data: dict[int, ClientExamples] = {}
        if self._unfit is None:
            self._template = FlatModel(task.seeded_model(0), self.device)
            self._model = StackedModel(self._template)
            self._engines: dict[Kind, Engine] = {}

    def refusal(self, local_update: str) -> str | None:
        """Return why clients cannot be trained together, a sentence, or None when they can."""
        if local_update not in LOCAL_UPDATES:
            return f"local update {local_update!r} is not written for several clients at once."
        if find("local-update", local_update).target is not LOCAL_UPDATES[local_update]:
            return f"local update {local_update!r} has been replaced by another one of that name."
        if type(self.task).examples_at is not Task.examples_at:
            return f"task {self.task.name!r} changes a client's examples from round to round."
        if self.options.precision != "float32":
            return f"precision={self.options.precision!r} is for one client at a time."
        optimizer = self.options.optimizer.lower()
        if self.options.optimizer_state != "reset":
            return f"optimizer_state={self.options.optimizer_state!r} hands on each client's own state."
        if optimizer not in _ELEMENTWISE and local_update != "anchor":
            return (
                f"optimizer {optimizer!r} does not treat each parameter by itself; a stack would mix clients."
            )
        return self._unfit

    @property
    def size(self) -> int:
        """Number of the model's float parameters."""
        return self._template.layout.size

    def by_hand(self) -> bool:
        """Return whether hand-written layers compute the gradients, as the first client's examples tell."""
        for client in range(self.task.num_clients):
            try:
                kind = self._examples(client).kind
            except Exception:  # It will fail when it trains; another client tells.
                continue
            return isinstance(self._engine(kind), LayeredEngine)
        return False

    def at_once(self, client: int) -> int:
        """Return how many clients with no more examples than ``client`` are trained in one tensor program."""
        return self._at_once(self._examples(client))

    def chunk(self, parameters: int) -> int:
        """Return how many clients of ``parameters`` numbers each a call of `train` should bring, at most.

        More than are trained at once: clients are sorted by their number of examples first, so that those
        trained together are alike.
        """
        if self.device.type == "cpu":
            return min(1024, max(16, 8 * _CPU_PARAMETERS // parameters))
        return min(_CUDA_CLIENTS, max(16, _CUDA_NUMBERS // (4 * parameters)))

    def train(
        self, work: CohortWork, clients: Sequence[int], states: Sequence[WorkState], out: NDArray
    ) -> CohortOutcome:
        """Run the local update on each client and put its vector into its row of ``out``, shape (C, P).

        The vector is the model after training, for "anchor" the gradient. What clients keep is saved in
        ``states``, one for each client. A client that cannot be trained is among the failures, and its state
        stays as it was; the others are trained.
        """
        outcome = CohortOutcome(np.full(len(clients), np.nan))
        if self._closed_form(work):
            for i, client in enumerate(clients):
                self._train_alone(work, i, client, states[i], out, outcome)
            return outcome
        if self.device.type == "cpu":
            self._data.clear()  # The task keeps what it wants to keep.
        for members in self._chunks(work, clients, states, outcome):
            try:
                self._train_chunk(work, clients, members, states, out, outcome)
            except Exception as error:
                if len(members) == 1:
                    outcome.failures[members[0].position] = error
                    continue
                for member in members:  # Whose fault is it? States are saved last, so nothing has happened.
                    try:
                        self._train_chunk(work, clients, [member], states, out, outcome)
                    except Exception as own_error:
                        outcome.failures[member.position] = own_error
        return outcome

    def _train_chunk(
        self,
        work: CohortWork,
        clients: Sequence[int],
        members: Sequence[_Member],
        states: Sequence[WorkState],
        out: NDArray,
        outcome: CohortOutcome,
    ) -> None:
        self._model.begin(len(members), work.model)
        cohort = CohortRound(
            work,
            [clients[member.position] for member in members],
            Examples([member.examples for member in members]),
            CohortState([states[member.position] for member in members], [member.kept for member in members]),
            self._model,
            self._engine(members[0].examples.kind),
            self.options,
        )
        result = LOCAL_UPDATES[work.local_update](cohort)
        self._put(result, [member.position for member in members], out, outcome)

    def _chunks(
        self,
        work: CohortWork,
        clients: Sequence[int],
        states: Sequence[WorkState],
        outcome: CohortOutcome,
    ) -> list[list[_Member]]:
        """Return the clients to train together, larger ones first.

        Clients are alike when their examples have the same shapes, when all or none of them take their whole
        set in each step, and when they keep the same vectors (and from the same round, if that matters).
        """
        groups: dict[object, list[_Member]] = {}
        for i, (client, state) in enumerate(zip(clients, states, strict=True)):
            try:
                member = _Member(i, self._examples(client), state.load(self._model.size))
                since = state.last_round if work.config.get(keys.CONTINUAL) else None
            except Exception as error:
                outcome.failures[i] = error
                continue
            whole = member.examples.count <= self.options.batch_size
            key = (member.examples.kind, whole, frozenset(member.kept), since)
            groups.setdefault(key, []).append(member)
        chunks = []
        for group in groups.values():
            group.sort(key=lambda member: -member.examples.count)
            # Chunks of equal size: a last one of few clients costs nearly as much as a full one.
            number = -(-len(group) // self._at_once(group[0].examples))
            size = -(-len(group) // number)
            chunks += [group[start : start + size] for start in range(0, len(group), size)]
        return chunks

    def _put(self, result: Outcome, positions: list[int], out: NDArray, outcome: CohortOutcome) -> None:
        outcome.losses[positions] = result.train_loss
        for name, value in result.vectors.items():
            stack = value.cpu().numpy() if isinstance(value, Tensor) else value
            if name in (keys.ARRAYS, keys.GRADIENT):
                place = out
            else:
                place = outcome.extras.setdefault(name, np.zeros_like(out))
            for row, i in enumerate(positions):
                place[i] = stack[row] if stack.ndim > 1 else stack

    def _train_alone(
        self, work: CohortWork, i: int, client: int, state: WorkState, out: NDArray, outcome: CohortOutcome
    ) -> None:
        layout = self._template.layout
        content = RecordDict({name: layout.record(vector) for name, vector in work.vectors.items()})
        try:
            self._template.load_vector(work.model)
            alone = LocalRound(
                client=client,
                server_round=work.server_round,
                local_update=work.local_update,
                model=self._template,
                task=self.task,
                data=self._examples(client).data,
                options=self.options,
                lr=work.lr,
                config=work.config,
                content=content,
                state=cast(ClientState, state),
                optimizer=RoundOptimizer(self.options, RecordDict(), client, work.server_round, 0),
            )
            result = LOCAL_UPDATES[work.local_update](alone)
        except Exception as error:
            outcome.failures[i] = error
            return
        value = result.vectors[keys.ARRAYS]
        out[i] = to_vector(value) if isinstance(value, Tensor) else value
        outcome.losses[i] = result.train_loss

    def _engine(self, kind: Kind) -> Engine:
        engine = self._engines.get(kind)
        if engine is None:
            engine = self._engines[kind] = choose_engine(self.task, self._model, kind)
        return engine

    def _closed_form(self, work: CohortWork) -> bool:
        has_solver = type(self.task).admm_solver is not Task.admm_solver
        return work.local_update in ("admm", "dual-admm") and self.options.closed_form and has_solver

    def _at_once(self, largest: ClientExamples) -> int:
        """Return how many clients with no more examples than ``largest`` to train at once."""
        engine, parameters = self._engine(largest.kind), self._model.size
        numbers = max(1, engine.numbers * min(largest.count, self.options.batch_size))
        if self.device.type != "cpu":
            return min(_CUDA_CLIENTS, max(1, _CUDA_NUMBERS // (4 * parameters + 4 * numbers)))
        count = min(_CPU_CLIENTS, _CPU_PARAMETERS // parameters, _CPU_NUMBERS // numbers)
        return max(1, 1 if engine.alone and count < _CPU_FEW else count)

    def _examples(self, client: int) -> ClientExamples:
        held = self._data.get(client)
        if held is None:
            held = self._data[client] = ClientExamples(client_examples(self.task, client, self.device))
        return held


def _unfit(module: nn.Module) -> str | None:
    """Return why ``module`` cannot be stacked, None when it can."""
    buffers = [name for name, _ in module.named_buffers()]
    if buffers:
        return f"the model has buffers ({buffers[0]!r}, ...), such as batch norm's statistics."
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            return f"the model's layer {name!r} draws random numbers while it trains."
        if not getattr(layer, "stackable", True):
            return f"the model's layer {name!r} has a gradient of its own, for one client at a time."
    try:
        FlatModel(module)
    except LayoutError as error:
        return f"the model cannot be one flat vector: {error}"
    return None
