"""SCAFFOLD's client (arXiv 1910.06378): control variates against client drift, Option II."""

from __future__ import annotations

from typing import Final

from turnout.client.flat_model import to_vector
from turnout.client.work import Outcome, Work
from turnout.wire import keys
from turnout.wire.registry import register

_CONTROL: Final = "control"


@register(
    "scaffold", kind="local-update", paper="1910.06378", summary="Local SGD with control variates (SCAFFOLD)"
)
def scaffold(work: Work) -> Outcome:
    """Step ``y -= lr (grad_b(y) - c_i + c)``, then ``c_i_new = c_i - c + (x - y) / (K lr)`` (Option II).

    Replies y and, as record "control", ``c_i_new - c_i``. Needs plain SGD.
    """
    work.require_plain_sgd()
    model = work.model
    c = work.needed(keys.CONTROL)
    kept = work.state.load(model.size)
    c_i = model.tensor(kept[_CONTROL]) if kept else c.new_zeros(c.shape)
    x = work.received()
    descent = work.descend(linear=c_i - c)
    change = (x - model.parameters).div_(descent.steps * work.lr).sub_(c)
    work.state.save({_CONTROL: to_vector(c_i + change)})
    return Outcome({keys.ARRAYS: model.parameters, keys.CONTROL: change}, descent.train_loss)
