"""The modules of a model that have a say in its training, addressed as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from flwr.app import Array
from torch import Tensor, nn

from turnout.allocation import KeptPart, kept_parts
from turnout.tasks.training_part import TrainingPart
from turnout.wire.arrays import view


class TrainingParts:
    """Drives the `TrainingPart` modules of ``module`` through one local training after the other."""

    def __init__(self, module: nn.Module) -> None:
        named = {name: part for name, part in module.named_modules() if isinstance(part, TrainingPart)}
        self._parts: Sequence[TrainingPart] = list(named.values())
        self._narrowing = {name: part for name, part in named.items() if part.narrows}
        self._held: list[tuple[Tensor, Tensor]] = []

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._parts)

    def start(self, server_round: int, seed: tuple[int, ...]) -> None:
        """Open the local training of a round."""
        for tensor, _ in self._held:  # Another client's training broke off within a step.
            tensor.requires_grad_(True)
        self._held.clear()
        for part in self._parts:
            part.start_training(server_round, seed)

    def before_step(self, loss: Callable[[], Tensor]) -> None:
        """Prepare for a step: parameters that rest get no gradient."""
        for part in self._parts:
            part.before_step(loss)
        for tensor in (tensor for part in self._parts for tensor in part.resting()):
            self._held.append((tensor, tensor.detach().clone()))
            tensor.requires_grad_(False)

    def penalty(self, loss: Tensor) -> Tensor:
        """Return ``loss`` with the parts' penalties added."""
        for part in self._parts:
            penalty = part.penalty()
            if penalty is not None:
                loss = loss + penalty
        return loss

    def enter_step(self) -> None:
        """Let the parts choose the coordinates in which the optimizer steps."""
        for part in self._parts:
            part.enter_step()

    def after_gradient(self) -> None:
        """Show the parts the gradient of the loss."""
        for part in self._parts:
            part.after_gradient()

    def leave_step(self) -> None:
        """Put back what had to rest, whatever momentum or decay did to it."""
        for part in self._parts:
            part.leave_step()
        with torch.no_grad():
            for tensor, value in self._held:
                tensor.copy_(value)
                tensor.requires_grad_(True)
        self._held.clear()

    def kept(self, record: Mapping[str, Array]) -> dict[str, KeptPart]:
        """Return by tensor what the masks in a received ``record`` leave of it, where they leave a part."""
        made: dict[str, KeptPart] = {}
        for name, part in self._narrowing.items():
            path = f"{name}." if name else ""
            masks = {f"{path}{own}" for own, _ in part.narrows.values()}
            made |= kept_parts({mask: view(record[mask]) for mask in masks if mask in record}, part.narrows)
        return made

    def end(self) -> None:
        """Close the local training."""
        for part in self._parts:
            part.end_training()
