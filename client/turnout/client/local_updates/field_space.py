"""Local training in field space (arXiv 2212.02846): binary weights, held to the global posterior."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from turnout.client.flat_model import to_vector
from turnout.client.local_round import LocalRound
from turnout.client.work import Outcome, Work
from turnout.optim.binary_fields import set_noise, set_temperature
from turnout.optim.field_space_continual import FieldOptimizer, field_groups
from turnout.wire import keys
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register

_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
_STEPS: Final = "step"


@register(
    "field-space",
    kind="local-update",
    paper="2212.02846",
    summary="Variational training of binary weights against a prior",
)
def field_space(work: Work) -> Outcome:
    """Train the fields at the server's temperature; reply them.

    The prior is the request's record "prior" if there is one, else the received model: a proximal term that
    weighs each weight by its uncertainty. Parameters that are no fields get ordinary Adam steps. Adam's
    moments start anew, or are those that the client kept, if the request asks for that.
    """
    if not isinstance(work, LocalRound):
        raise ConfigError("local update 'field-space' trains one client at a time; use another executor.")
    module = work.model.module
    beta = work.number(keys.TEMPERATURE, positive=True)
    set_temperature(module, beta)
    seed = int(work.generator().integers(2**63))
    set_noise(module, torch.Generator(work.model.parameters.device).manual_seed(seed))
    optimizer = FieldOptimizer(
        field_groups(module),
        lr=work.lr,
        beta=beta,
        kl_weight=work.number(keys.KL_WEIGHT) / len(work.data),
    )
    sent = work.extra(keys.PRIOR)
    prior = work.received() if sent is None else work.model.tensor(sent)
    by_name = dict(module.named_parameters())
    optimizer.new_task(
        {
            by_name[spec.name]: prior[spec.offset : spec.offset + spec.size].view(spec.shape)
            for spec in work.model.layout.tensors
            if spec.name in by_name
        }
    )
    keeps = work.flag(keys.KEEP_MOMENTS)
    if keeps:
        _take_moments(optimizer, work)
    work.model.train(True)
    losses = []
    for batch in work.batches():
        losses.append(work.gradient(batch))
        optimizer.step()
    if keeps:
        _keep_moments(optimizer, work)
    return Outcome({keys.ARRAYS: work.model.parameters}, work.mean_loss(losses))


def _take_moments(optimizer: FieldOptimizer, work: LocalRound) -> None:
    kept = {name: work.model.tensor(vector) for name, vector in work.state.load(work.model.size).items()}
    for state, piece, shape in _places(optimizer, work) if kept else ():
        state |= {name: kept[name][piece].view(shape) for name in _MOMENTS}
        state[_STEPS] = int(work.state.number(_STEPS))


def _keep_moments(optimizer: FieldOptimizer, work: LocalRound) -> None:
    vectors = {name: torch.zeros_like(work.model.parameters) for name in _MOMENTS}
    steps = 0
    for state, piece, _ in _places(optimizer, work):
        steps = max(steps, state.get(_STEPS, 0))
        for name in _MOMENTS if _STEPS in state else ():
            vectors[name][piece] = state[name].reshape(-1)
    work.state.save({name: to_vector(vector) for name, vector in vectors.items()}, **{_STEPS: steps})


def _places(
    optimizer: FieldOptimizer, work: LocalRound
) -> Iterator[tuple[dict[str, Any], slice, torch.Size]]:
    """Yield each trained parameter's state, its place in the flat vector and its shape."""
    by_name: dict[str, Tensor] = dict(work.model.module.named_parameters())
    for spec in work.model.layout.tensors:
        if spec.name in by_name:
            p = by_name[spec.name]
            yield optimizer.state[p], slice(spec.offset, spec.offset + spec.size), p.shape
