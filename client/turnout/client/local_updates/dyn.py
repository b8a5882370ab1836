"""FedDyn's client (arXiv 2111.04263): a dynamic regulariser that the client carries between rounds."""

from __future__ import annotations

from typing import Final

from turnout.client.flat_model import to_vector
from turnout.client.work import Outcome, Work
from turnout.wire import keys
from turnout.wire.registry import register

_REGULARISER: Final = "regulariser"


@register("dyn", kind="local-update", paper="2111.04263", summary="Local training with FedDyn's regulariser")
def dyn(work: Work) -> Outcome:
    """Descend on ``f_i(w) - <g_i, w> + alpha/2 ||w - x||^2`` to y, then ``g_i -= alpha (y - x)``; reply y."""
    model = work.model
    alpha = work.number(keys.DYN_ALPHA, positive=True)
    x = work.received()
    kept = work.state.load(model.size)
    g = model.tensor(kept[_REGULARISER]) if kept else x.new_zeros(x.shape)
    descent = work.descend(centre=x, rho=alpha, linear=g)
    work.state.save({_REGULARISER: to_vector(g.sub(model.parameters - x, alpha=alpha))})
    return Outcome({keys.ARRAYS: model.parameters}, descent.train_loss)
