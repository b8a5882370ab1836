"""What a strategy must know of a run's adapters: the state they share, and how their factors are averaged.

The shared state is fixed by the server when the run starts, and picked anew when a method says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

from flwr.app import ArrayRecord

from turnout.allocation import DenseForm, KernelForm, NetworkForm
from turnout.strategies.admm import ScheduledADMM
from turnout.strategies.coordinates import Coordinates
from turnout.strategies.eggroll import EGGROLL
from turnout.strategies.folded_kernels import FoldedKernels
from turnout.strategies.network_updates import FrozenNetwork, NetworkUpdates
from turnout.strategies.shared_state import Source
from turnout.strategies.svd_factors import SvdFactors
from turnout.strategies.svd_triplets import SvdTriplets
from turnout.wire import ConfigError, NDArray

if TYPE_CHECKING:
    from turnout.peft import AdaptedTask, AdapterConfig
    from turnout.strategies import StreamingStrategy
    from turnout.tasks import Task


def couple(
    strategy: StreamingStrategy, config: AdapterConfig, task: Callable[[], Task], local_steps: int | None
) -> None:
    """Prepare ``strategy`` for adapters of ``config`` on the model of ``task``, an `AdaptedTask`.

    ``local_steps`` is what a client takes in a round, None if that differs.
    Raises `ConfigError` for a strategy that remembers vectors of clients while the shared state is to change:
    they would be about other entries; and where dense updates cannot be averaged with it.
    """
    interval = config.refresh_interval
    # An estimator counts rounds; all other state is vectors of earlier rounds, here or with the clients.
    remembers = bool(strategy.carried_vectors) or any(name != "estimator" for name in strategy.state_names)
    if interval is not None and remembers:
        raise ConfigError(
            f"update_interval={interval} changes what the numbers that travel stand for, and "
            f"{type(strategy).__name__} remembers earlier ones; leave it out, or take a strategy without "
            "memory such as fedavg or fedau."
        )
    strategy.partial_replies = True  # Some adapters train a part of their tensors in a round.
    strategy.allocator = config.allocator(local_steps)
    if config.dense_form is not None:
        _average_dense(strategy, config, cast("Callable[[], AdaptedTask]", task))
    if config.shares:  # Else nothing asks for the task, which takes a resumed server seconds to make.
        strategy.shared.source = AdapterState(cast("Callable[[], AdaptedTask]", task), interval)


def _average_dense(
    strategy: StreamingStrategy, config: AdapterConfig, task: Callable[[], AdaptedTask]
) -> None:
    """Let ``strategy`` compute with dense updates. Raises `ConfigError` where that cannot be."""
    if strategy.carried_vectors:
        raise ConfigError(
            f"aggregation={config.aggregation!r} makes new factors in every round; "
            "optimizer_state='send' averages what is about the old ones; use optimizer_state='reset'."
        )
    if isinstance(strategy, EGGROLL):
        raise ConfigError(
            f"aggregation={config.aggregation!r} averages clients' dense updates, and eggroll's clients send "
            "none; leave aggregation out."
        )
    if isinstance(config.dense_form, KernelForm) and isinstance(strategy, ScheduledADMM):
        raise ConfigError(
            "aggregation='exact-fold' moves what the clients trained into the weight in every round, and "
            f"{type(strategy).__name__}'s clients keep models of their own; use 'approximate'."
        )
    assert config.dense_form is not None
    strategy.coordinates = _coordinates(config.dense_form, task)


def _coordinates(form: DenseForm, task: Callable[[], AdaptedTask]) -> Coordinates:
    """Return what lets a strategy compute with the dense updates of ``form``."""
    if isinstance(form, NetworkForm):
        return NetworkUpdates(lambda: _networks(task()), form.name, form.scale)
    if isinstance(form, KernelForm):
        return FoldedKernels(form.scale)
    factors = SvdFactors if len(form.groups[0]) == 2 else SvdTriplets
    return factors(form.groups, form.scale)


def _networks(task: AdaptedTask) -> dict[str, FrozenNetwork]:
    """Return the frozen networks of the task's model by layer."""
    from turnout.peft import Adapted
    from turnout.peft.tera import Tera

    return {
        name: FrozenNetwork(
            layer.tera_core.double().numpy(), [f.double().numpy() for f in layer.factors], layer.outputs
        )
        for name, layer in Adapted.of(task.model()).layers.items()
        if isinstance(layer, Tera)
    }


class AdapterState(Source):
    """The state of the adapters of ``task``, which is asked for when it is needed first.

    ``update_interval`` is the number of rounds after which it is picked anew; None never does.
    """

    def __init__(self, task: Callable[[], AdaptedTask], update_interval: int | None = None) -> None:
        self._task = task
        self._update_interval = update_interval

    def begin(self) -> Mapping[str, NDArray]:
        """Return the state as seeds and base weights make it."""
        return self._task().shared_arrays()

    def resume(self, arrays: Mapping[str, NDArray]) -> None:
        """Make the server's own models ones of the state that a checkpoint holds."""
        self._task().load_shared_arrays(arrays)

    def end_round(
        self, server_round: int, model: ArrayRecord
    ) -> tuple[ArrayRecord, Mapping[str, NDArray]] | None:
        """Pick the state anew from the present weights when it is time to."""
        if self._update_interval is None or server_round % self._update_interval:
            return None
        return self._task().refreshed(model)
