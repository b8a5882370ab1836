"""Bilevel tasks: an upper problem in x over the solution of a lower problem in y, spread over clients."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from torch import Tensor, nn

from turnout.tasks.task import ClientData, Task

Batch = tuple[Tensor, Tensor]


class BilevelTask(Task):
    """``min_x sum_k p_k f_k(x, y*)``, where y* minimises the lower losses g.

    The task's model is the level that is shared by all clients and travels; the other level is each client's
    own and never leaves it. `client_data` are the lower problem's examples, `upper_data` the upper one's.
    """

    shared: ClassVar[Literal["upper", "lower"]]
    """Which level `model` is."""

    @abstractmethod
    def upper_data(self, client: int) -> ClientData:
        """Return the examples of ``client`` that its upper loss is taken over."""

    @abstractmethod
    def initial_own(self, client: int) -> list[Tensor]:
        """Return new tensors: what ``client`` starts its own level from."""

    @abstractmethod
    def upper_loss(self, model: nn.Module, own: list[Tensor], batch: Batch) -> Tensor:
        """Return f_k on a batch of `upper_data`, a scalar differentiable in both levels."""

    @abstractmethod
    def lower_loss(self, model: nn.Module, own: list[Tensor], batch: Batch, rows: Tensor) -> Tensor:
        """Return g_k on a batch of `client_data`, whose examples are number ``rows`` there.

        Strongly convex in the lower variables: their weight decay belongs in here.
        """
