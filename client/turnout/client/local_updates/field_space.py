"""Local training in field space (arXiv 2212.02846): binary weights, held to the global posterior."""

from __future__ import annotations

import torch

from turnout.client.local_round import LocalRound
from turnout.client.work import Outcome, Work
from turnout.optim.binary_fields import set_noise, set_temperature
from turnout.optim.field_space_continual import FieldOptimizer, field_groups
from turnout.wire import keys
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register


@register(
    "field-space",
    kind="local-update",
    paper="2212.02846",
    summary="Variational training of binary weights against a prior",
)
def field_space(work: Work) -> Outcome:
    """Train the fields at the server's temperature; reply them.

    The prior is the request's record "prior" if there is one, else the received model: a proximal term that
    weighs each weight by its uncertainty. Parameters that are no fields get ordinary Adam steps.
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
    work.model.train(True)
    losses = []
    for batch in work.batches():
        losses.append(work.gradient(batch))
        optimizer.step()
    return Outcome({keys.ARRAYS: work.model.parameters}, work.mean_loss(losses))
