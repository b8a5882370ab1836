"""Modules that have a say in how they are trained: a penalty, layers that rest, scores from gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

from torch import Tensor

from turnout.allocation import Sides


class TrainingPart:
    """Mixin of a module that takes part in local training; each of its methods may be left as it is.

    One local training calls `start_training`, for every step `before_step`, `resting`, `penalty`,
    `after_gradient`, `enter_step` and `leave_step`, and then `end_training`. Evaluation calls none of them.
    Between trainings, what travels must be as other clients understand it.

    ``narrows`` are own tensors of which a mask among the buffers may fix a part for good.
    """

    narrows: ClassVar[Sides] = {}

    def start_training(self, server_round: int, seed: tuple[int, ...]) -> None:
        """Prepare for the local training of a round; ``seed`` is the client's own for this round."""

    def before_step(self, loss: Callable[[], Tensor]) -> None:
        """Prepare for a step; ``loss()`` is the loss on its batch as the model is, without gradients."""

    def resting(self) -> Iterable[Tensor]:
        """Return the parameters that the coming step must leave as they are, whatever the optimizer does."""
        return ()

    def penalty(self) -> Tensor | None:
        """Return what is to be added to the loss, a scalar."""
        return None

    def after_gradient(self) -> None:
        """Look at the gradient of the loss (in ``.grad``); the step has not been taken."""

    def enter_step(self) -> None:
        """Change parameters and gradients to the coordinates in which the optimizer is to step."""

    def leave_step(self) -> None:
        """Change the parameters back after the step."""

    def end_training(self) -> None:
        """Finish: write into travelling buffers what the server is to learn."""
