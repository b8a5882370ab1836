"""What the optimizers of this library share: checked groups, closures, exact state, a federation's view."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, Final, Literal, Self

import torch
from flwr.app import Array
from torch import Tensor, nn

from turnout.optim.roles import parameter_roles
from turnout.tasks.validation import check_number
from turnout.wire.arrays import NDArray
from turnout.wire.errors import ConfigError

Group = dict[str, Any]
StatePolicy = Literal["reset", "keep", "send"]
"""What becomes of an optimizer's state between rounds, see `ModuleOptimizer.advise`."""

_HALF: Final = (torch.float16, torch.bfloat16)
_FULL: Final = (torch.float32, torch.float64)
_STEP: Final = "step"
# Counts stay on the CPU, where steps read them.
_COUNTS: Final = ("step", "window")


class ModuleOptimizer(torch.optim.Optimizer):
    """Base class. Subclasses write `update` for one parameter group, and name what is state.

    Sparse gradients, complex and integer parameters are refused with `ConfigError`. State is tensors only,
    and a state dict is restored with the dtypes it has (``torch.optim`` would cast index tensors and float32
    accumulators to the parameter's dtype), so that a resumed run equals an uninterrupted one bit for bit;
    that of a float32 model goes on in float64 where the parameters do, and the other way round. Parameters
    without numbers have no state.
    """

    #: The group key that says whether parameters get the method, and its values: they do, they do not.
    split_key: ClassVar[tuple[str, Any, Any] | None] = None
    #: Keys of the parameter groups that change while training, beside per-parameter state.
    group_state: ClassVar[tuple[str, ...]] = ()
    #: Per-parameter state that clients may send and a server average; shaped like the parameter.
    carried: ClassVar[tuple[str, ...]] = ()
    #: Attributes that copies and pickles have, beside parameters, groups and state.
    own: ClassVar[tuple[str, ...]] = ()
    #: Whose randomness ``seed`` is: one for all clients of a round, one per client, or none.
    seeding: ClassVar[Literal["round", "client"] | None] = None

    @classmethod
    def for_module(cls, module: nn.Module, **options: Any) -> Self:
        """Return an optimizer of ``module``'s trainable parameters, grouped as the method prescribes."""
        return cls(cls.module_groups(module, options), **options)

    @classmethod
    def module_groups(cls, module: nn.Module, options: Mapping[str, Any]) -> list[Group]:
        """Return the parameter groups of ``module``.

        Matrices are for the method; vectors, embeddings and the output layer are the others of `split_key`.
        """
        if cls.split_key is None:
            return [{"params": [p for p in module.parameters() if p.requires_grad]}]
        roles, (key, method, other) = parameter_roles(module), cls.split_key
        rest = [*roles["vector"], *roles["embedding"], *roles["head"]]
        groups = [{"params": roles["matrix"], key: method}, {"params": rest, key: other}]
        return [group for group in groups if group["params"]]

    @classmethod
    def advise(cls, policy: StatePolicy, options: Mapping[str, Any], local_steps: int | None) -> str | None:
        """Return a warning about ``policy`` for clients that take ``local_steps`` a round (None: epochs).

        ``options`` are those that the user gave. Raises `ConfigError` where the policy breaks the method.
        """
        return None

    @classmethod
    def carried_state(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what of `carried` an optimizer with these options has. Default: all."""
        return cls.carried

    # --- groups ----------------------------------------------------------------------------------------

    def parts(self, group: Group) -> list[Group]:
        """Return ``group`` as the groups it stands for: split by dimensions if it has not `split_key`."""
        if self.split_key is None or self.split_key[0] in group:
            return [group]
        key, method, other = self.split_key
        matrices: list[Any] = []
        rest: list[Any] = []
        for item in group["params"]:
            p = item[1] if isinstance(item, tuple) else item  # Named parameters are pairs.
            (matrices if p.dim() >= 2 else rest).append(item)
        groups = [{**group, "params": matrices, key: method}, {**group, "params": rest, key: other}]
        # An empty list of parameters is for torch to complain about.
        return [part for part in groups if part["params"]] or groups[:1]

    def check_group(self, group: Group) -> None:
        """Raise `ConfigError` for hyperparameters that are not possible; all defaults are filled in."""
        check_number("lr", group["lr"], low=0)

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group; raises `ConfigError` for impossible values and leaves none behind then."""
        params = param_group["params"]
        listed = [params] if isinstance(params, Tensor) else list(params)
        for part in self.parts({**param_group, "params": listed}):
            super().add_param_group(part)
            try:
                _check_parameters(self.param_groups[-1]["params"])
                self.check_group(self.param_groups[-1])
            except ConfigError:
                self.param_groups.pop()
                raise

    # --- steps -----------------------------------------------------------------------------------------

    @abstractmethod
    def update(self, group: Group, params: list[Tensor]) -> None:
        """Take one step with ``params``, the group's parameters that have a gradient (perhaps none)."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; ``closure``, if given, computes the gradients and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            for p in params:
                if p.grad.layout != torch.strided:
                    raise ConfigError(
                        f"{type(self).__name__}: a parameter of shape {tuple(p.shape)} has a sparse "
                        "gradient, which this optimizer cannot use; build its layer with sparse=False."
                    )
            self.update(group, params)
        return loss

    # --- state -----------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return what makes a copy; ``torch.optim`` leaves out attributes of subclasses."""
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in self.own}}

    def check_state(self, parameter: Tensor, state: Mapping[str, Any]) -> None:
        """Raise `ConfigError` when ``state`` cannot be that of ``parameter``."""
        for key in self.carried:
            value = state.get(key)
            if isinstance(value, Tensor) and value.shape != parameter.shape:
                raise ConfigError(
                    f"state {key!r} has shape {tuple(value.shape)}, but its parameter has "
                    f"{tuple(parameter.shape)}; load the state of the same model and groups."
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state dict of `state_dict`, every tensor in its own dtype."""
        known = chain.from_iterable(group["params"] for group in self.param_groups)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        matched = [
            (p, state_dict["state"].get(number, {})) for number, p in zip(numbers, known, strict=False)
        ]
        for p, state in matched:
            self.check_state(p, state)
        super().load_state_dict(state_dict)
        for p, state in matched:
            for key, value in state.items():
                if isinstance(value, Tensor):
                    device = "cpu" if key in _COUNTS else p.device
                    dtype = value.dtype
                    if dtype in _FULL and key not in _COUNTS:  # Of a model that has changed its precision.
                        dtype = state_dtype(p)
                    self.state[p][key] = value.detach().to(device, dtype, copy=True)

    # --- what a federation asks ------------------------------------------------------------------------

    @torch.no_grad()
    def begin_round(self, missed_rounds: int = 0, steps: int = 1) -> None:
        """Note that the parameters have been replaced by a new global model.

        ``missed_rounds`` went by, of ``steps`` steps each, while this state was kept.
        """

    @classmethod
    def check_coding(cls, options: Mapping[str, Any]) -> None:
        """Raise `ConfigError` unless `coded` has a code with these options, which the user gave."""
        raise ConfigError(f"reply='coded': {cls.__name__} has no code for its weights; use reply='dense'.")

    def coded(self, parameter: Tensor, old: NDArray) -> Array | None:
        """Return the parameter as it travels in a coded reply, None as every other tensor does.

        The receiver has ``old``, what the parameter was before the last `begin_round`. What is decoded
        replaces the parameter, so that a client has what it sent. Raises `ConfigError` when the code does not
        fit.
        """
        return None

    def export(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return what of the parameter's state is sent: tensors of its shape by their names in `carried`.

        State of fewer numbers comes first in such a tensor, row by row: zeros at its end do not travel.
        """
        state = self.state.get(parameter, {})
        return {key: state[key] for key in self.carried if key in state}

    def adopt(self, parameter: Tensor, sent: Mapping[str, Tensor], steps: int) -> None:
        """Continue from averaged state, after ``steps`` steps; state that was not sent begins anew."""
        state = {key: sent[key].to(state_dtype(parameter), copy=True) for key in self.carried if key in sent}
        self.state[parameter] = {_STEP: step_count(steps), **state}


def _check_parameters(params: Sequence[Tensor]) -> None:
    for p in params:
        if not p.is_floating_point():
            raise ConfigError(
                f"a parameter of shape {tuple(p.shape)} is {p.dtype}; this optimizer trains real "
                "floating-point parameters only, leave it out of the groups."
            )


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's state: float32 for half precision, else its own."""
    return torch.float32 if parameter.dtype in _HALF else parameter.dtype


def zeros_for(parameter: Tensor) -> Tensor:
    """Return zeroed state of the parameter's shape."""
    return torch.zeros_like(parameter, dtype=state_dtype(parameter), memory_format=torch.preserve_format)


def gradient_of(parameter: Tensor) -> Tensor:
    """Return the parameter's gradient in the dtype of its state."""
    assert parameter.grad is not None
    return parameter.grad.to(state_dtype(parameter))


def step_count(steps: int = 0) -> Tensor:
    """Return a step counter, on the CPU as ``torch.optim`` keeps it."""
    return torch.tensor(float(steps), dtype=torch.float32)


def in_turn(params: list[Tensor], foreach: bool | None) -> list[list[Tensor]]:
    """Return the lists to hand to one kernel each: all of ``params``, or one by one.

    By default all at once on CUDA, where launches cost more than arithmetic, and one by one on a CPU, where a
    tensor should stay in the cache through all operations of its step.
    """
    if not params:
        return []
    together = params[0].device.type == "cuda" if foreach is None else foreach
    if together and len({(p.device, p.dtype) for p in params}) == 1:
        return [params]
    return [[p] for p in params]
