"""A client's optimizer over one round: made for each local training, its state from and to where it belongs.

With "keep" the state lies in Flower's ``Context.state``, so that any engine persists it. With "send" it comes
with the request and goes with the reply, one record per kind of state, laid out as the parameters are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from turnout.client.coded_reply import CodedReply
from turnout.client.flat_model import FlatModel
from turnout.client.optimizer_choice import carried_names, make, module_optimizer
from turnout.client.options import TrainOptions
from turnout.optim import ModuleOptimizer
from turnout.tasks.task import Vector
from turnout.wire import keys
from turnout.wire.arrays import NDArray, as_array, view
from turnout.wire.errors import ConfigError

_ARRAYS: Final = "turnout.optimizer.arrays"
_ABOUT: Final = "turnout.optimizer.about"
_STEP: Final = "step"
_RECORD: Final = f"{keys.OPTIMIZER}."
# Second moments and sums of sizes: the mean that comes back must not make a root's argument negative.
_NONNEGATIVE: Final = frozenset({"exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf", "grad_sum"})

Extra = Callable[[str], Vector | None]


@dataclass(slots=True)
class RoundOptimizer:
    """The optimizer of one client in one round.

    ``records`` are the client's own and change in `commit` only. ``steps`` is how many steps the client takes
    in a round's local training.
    """

    options: TrainOptions
    records: RecordDict
    client: int
    server_round: int
    steps: int
    config: ConfigRecord = field(default_factory=ConfigRecord)
    _state: dict[str, NDArray] | None = None
    _sent: dict[str, Tensor] | None = None
    _coded: CodedReply | None = None

    def begin(self, model: FlatModel, lr: float, extra: Extra) -> torch.optim.Optimizer:
        """Return the optimizer for a local training of ``model``, whose gradient it reads.

        Raises `ConfigError` when the kept state is of another optimizer or model.
        """
        leaf = model.parameters.detach().requires_grad_()  # The same storage, as a leaf.
        leaf.grad = model.gradient
        optimizer = make(self.options, model.module, leaf, lr, seed=self._seed())
        policy, missed = self.options.optimizer_state, 0
        if policy == "keep":
            kept, missed = self._kept()
            if kept:
                load_arrays(optimizer, kept)
        elif policy == "send":
            self._adopt(optimizer, model, extra)
        if self.options.reply == "coded":
            self._coded = CodedReply(model.vector())
        if isinstance(optimizer, ModuleOptimizer):
            optimizer.begin_round(missed, self.steps)  # Which may round the received model.
        return optimizer

    def end(self, optimizer: torch.optim.Optimizer, model: FlatModel) -> None:
        """Take the optimizer's state after a local training."""
        policy = self.options.optimizer_state
        if policy == "keep":
            self._state = state_arrays(optimizer)
        elif policy == "send":
            self._sent = self._export(optimizer, model)
        if self._coded is not None and isinstance(optimizer, ModuleOptimizer):
            self._coded.settle(optimizer, model, _places(optimizer, model))

    def codes(self, received: Vector, sent: object) -> dict[int, Array]:
        """Return the tensors of the reply ``sent`` (P,) that travel in codes, by their offsets.

        Raises `ConfigError` unless one local training made ``sent`` of the ``received`` model.
        """
        if self.options.reply != "coded":
            return {}
        return (self._coded or CodedReply(np.empty(0))).checked(received, sent)

    def commit(self) -> dict[str, Tensor]:
        """Keep the state if it is to be kept; return the records to send, shape (P,) each.

        Raises `ConfigError` when there is state to send but no step was taken with the optimizer.
        """
        if self._state is not None:
            record = ArrayRecord()
            for name, value in self._state.items():
                record[name] = as_array(value)
            self.records[_ARRAYS] = record
            self.records[_ABOUT] = ConfigRecord(
                {"optimizer": self.options.optimizer.lower(), "round": self.server_round}
            )
        if self.options.optimizer_state != "send":
            return {}
        if self._sent is None:
            raise ConfigError(
                "optimizer_state='send', but this local update takes no step with the optimizer; use "
                "optimizer_state='reset' with it."
            )
        return self._sent

    def _seed(self) -> int:
        """Return the seed of the optimizer's own randomness.

        Methods that pick a subspace pick the same one on every client; with state that is carried on, the
        choice goes by steps and the seed stays. Rounding noise is each client's own.
        """
        words = [int(self.options.optimizer_options.get("seed", self.options.seed))]
        if self.options.optimizer_state == "reset" or _is_own(self.options):
            words.append(self.server_round)
        if _is_own(self.options):
            words.append(self.client)
        return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _kept(self) -> tuple[dict[str, NDArray], int]:
        """Return the state to go on from and how many rounds the client missed since it was kept."""
        if self._state is not None:  # A further local training in this round.
            return self._state, 0
        about, record = self.records.get(_ABOUT), self.records.get(_ARRAYS)
        if self.server_round <= 1 or about is None:
            return {}, 0
        if not isinstance(about, ConfigRecord) or not isinstance(record, ArrayRecord):
            raise ConfigError(f"client state {_ABOUT!r} is damaged; clear the client's state.")
        if about["optimizer"] != self.options.optimizer.lower():
            raise ConfigError(
                f"the client keeps the state of optimizer {about['optimizer']!r}, but optimizer="
                f"{self.options.optimizer!r}; clear the client's state, or go on with that optimizer."
            )
        kept = {name: view(array) for name, array in record.items()}
        return kept, max(0, self.server_round - int(str(about["round"])) - 1)

    def _adopt(self, optimizer: torch.optim.Optimizer, model: FlatModel, extra: Extra) -> None:
        names = carried_names(self.options)
        received = {name.removeprefix(_RECORD): extra(name) for name in names}
        if any(vector is None for vector in received.values()):
            return  # The run's first round: there is no mean yet.
        rounds = self.config.get(keys.CARRIED_ROUNDS, 0)
        if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
            raise ConfigError(
                f"{keys.CARRIED_ROUNDS}={rounds!r} in the request's config is not possible; a strategy that "
                "sends optimizer state must send how many rounds made it, a whole number above 0."
            )
        tensors = {name: model.tensor(vector) for name, vector in received.items() if vector is not None}
        for name in tensors.keys() & _NONNEGATIVE:
            tensors[name].clamp_(min=0.0)
        steps = rounds * self.steps
        for p, piece in _places(optimizer, model):
            own = {name: vector[piece].view(p.shape) for name, vector in tensors.items()}
            if isinstance(optimizer, ModuleOptimizer):
                optimizer.adopt(p, own, steps)
            else:  # One flat leaf: the vectors are its state as they are.
                optimizer.state[p] = {_STEP: torch.tensor(float(steps)), **own}

    def _export(self, optimizer: torch.optim.Optimizer, model: FlatModel) -> dict[str, Tensor]:
        sent = {name: torch.zeros_like(model.parameters) for name in carried_names(self.options)}
        for p, piece in _places(optimizer, model):
            state: Mapping[str, Any] = optimizer.state.get(p, {})
            if isinstance(optimizer, ModuleOptimizer):
                state = optimizer.export(p)
            for name, vector in sent.items():
                value = state.get(name.removeprefix(_RECORD))
                if value is not None:
                    vector[piece] = value.reshape(-1)
        return sent


def _is_own(options: TrainOptions) -> bool:
    """Return whether the optimizer's randomness is each client's own."""
    kind = module_optimizer(options.optimizer)
    return kind is not None and kind.seeding == "client"


def _places(optimizer: torch.optim.Optimizer, model: FlatModel) -> Iterator[tuple[Tensor, slice]]:
    """Yield the optimizer's parameters and where each lies in the flat vector."""
    start, width = model.parameters.data_ptr(), model.parameters.element_size()
    for group in optimizer.param_groups:
        for p in group["params"]:
            offset = (p.data_ptr() - start) // width
            yield p, slice(offset, offset + p.numel())


def state_arrays(optimizer: torch.optim.Optimizer) -> dict[str, NDArray]:
    """Return an optimizer's state as arrays by name, copied."""
    tree, arrays = optimizer.state_dict(), {}
    for number, state in tree["state"].items():
        for name, value in state.items():
            if value is not None:
                arrays[f"{number}.{name}"] = _array(value)
    for number, group in enumerate(tree["param_groups"]):
        for name in getattr(optimizer, "group_state", ()):
            if name in group:
                arrays[f"group{number}.{name}"] = _array(group[name])
    return arrays


def load_arrays(optimizer: torch.optim.Optimizer, arrays: Mapping[str, NDArray]) -> None:
    """Restore the state that `state_arrays` returned; `ConfigError` when it is of another model."""
    tree = optimizer.state_dict()
    count = sum(len(group["params"]) for group in tree["param_groups"])
    state: dict[int, dict[str, Any]] = {}
    for name, array in arrays.items():
        place, _, key = name.partition(".")
        value: Any = torch.from_numpy(np.array(array))
        if place.startswith("group"):
            group = tree["param_groups"][int(place.removeprefix("group"))]
            group[key] = value if isinstance(group[key], Tensor) else value.item()
        else:
            state.setdefault(int(place), {})[key] = value
    if any(number >= count for number in state):
        raise ConfigError(
            f"the client keeps an optimizer's state of {max(state) + 1} parameters, but the model has "
            f"{count}; clear the client's state, it is of another run."
        )
    try:
        optimizer.load_state_dict({"state": state, "param_groups": tree["param_groups"]})
    except ConfigError as error:
        raise ConfigError(
            f"the client's kept optimizer state does not fit: {error} Clear the client's state."
        ) from error


def _array(value: Any) -> NDArray:
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy().copy()
    return np.asarray(value)
