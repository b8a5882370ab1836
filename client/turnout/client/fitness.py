"""What an EGGROLL client measures: fitness differences of perturbed members on one minibatch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from turnout.client.members import Members, PairDraw
from turnout.optim.perturbed import Perturbed
from turnout.tasks.losses import loss_name
from turnout.tasks.task import Vector
from turnout.wire import keys
from turnout.wire.errors import unknown_name

if TYPE_CHECKING:
    from turnout.client.local_round import LocalRound
    from turnout.wire.replica import Replica

Measure = Callable[[Iterable[Any]], tuple[list[float], list[float]]]
"""Takes the outputs of some members; returns their fitnesses and their losses."""

_LOSS: Final = "loss"


def differences(work: LocalRound, replica: Replica, first: int, pairs: int) -> tuple[Vector, float]:
    """Return ``d_j = F_j+ - F_j-`` of ``pairs`` pairs from ``first`` on, float32, and the members' mean loss.

    All members see the round's first minibatch, in evaluation mode. A difference that is not finite is 0;
    others are clipped as the request says. Members of a sequence of linear layers are evaluated many at a
    time, others one by one; which of them follows from the model and the settings.
    """
    model, clip = work.model, work.number(keys.CLIP, positive=True)
    model.load_vector(replica.theta)
    model.train(False)
    x, y = next(iter(work.batches()))
    measure = _measure(work, str(work.config.get(keys.FITNESS_METRIC, "-loss")), y)
    draws = (replica.source.draw(work.server_round, first + j) for j in range(pairs))
    members = Members.of(model.module, replica.source, x)
    sigma = replica.search.sigma
    if members is None:
        chunks: Iterator[Iterable[Any]] = _one_by_one(work, replica, x, draws)
    else:
        chunks = (outputs.flatten(0, 1) for outputs in members.outputs(x, list(draws), sigma))
    fitness, losses = list[float](), list[float]()
    for outputs in chunks:
        values, measured = measure(outputs)
        fitness += values
        losses += measured
    with np.errstate(invalid="ignore"):
        found = np.subtract(fitness[::2], fitness[1::2])
    found = np.where(np.isfinite(found), np.clip(found, -clip, clip), 0.0)
    return found.astype(np.float32), float(np.mean(losses))


def _one_by_one(
    work: LocalRound, replica: Replica, x: Tensor, draws: Iterable[PairDraw]
) -> Iterator[list[Any]]:
    """Yield the outputs of each pair, plus and minus, of a model that is written anew for each member.

    ``draws`` are taken one at a time: full-rank noise is as large as the model.
    """
    model = work.model
    pieces = [model.parameters[t.offset : t.offset + t.size].view(t.shape) for t in model.layout.tensors]
    perturbed, inputs = Perturbed(replica.source, pieces), model.inputs(x)
    for draw in draws:
        outputs = []
        for scale in (replica.search.sigma, -replica.search.sigma):
            perturbed.write(draw, scale)
            with torch.no_grad():
                outputs.append(model.module(inputs))
        yield outputs


def _measure(work: LocalRound, fitness: str, y: Tensor) -> Measure:
    """Return what measures members on targets ``y``."""
    name, sign = fitness.removeprefix("-"), -1.0 if fitness.startswith("-") else 1.0
    task = work.task
    classes = loss_name(task) == "cross-entropy" and y.dim() == 1 and not y.is_floating_point()

    def measure(outputs: Iterable[Any]) -> tuple[list[float], list[float]]:
        with torch.no_grad():
            if name == _LOSS:
                if classes and isinstance(outputs, Tensor):
                    losses = _cross_entropies(outputs, y)
                else:
                    losses = [float(task.loss(output, y)) for output in outputs]
                return [sign * loss for loss in losses], losses
            metrics = [task.metrics(output, y) for output in outputs]
        if name not in metrics[0]:
            raise unknown_name(f"fitness: metric of task {task.name!r}", name, metrics[0])
        return [sign * one[name] for one in metrics], [one[_LOSS] for one in metrics]

    return measure


def _cross_entropies(outputs: Tensor, y: Tensor) -> list[float]:
    """Return the mean cross-entropy of each member, for ``outputs`` (members, b, classes)."""
    each = cross_entropy(outputs.flatten(0, 1), y.repeat(len(outputs)), reduction="none")
    means: list[float] = each.view(len(outputs), -1).mean(dim=1).tolist()
    return means
