"""Weights that move by whole steps: when those of FRUGAL do, and the code of a tensor of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import Array
from torch import Tensor

from turnout.wire.arrays import NDArray
from turnout.wire.errors import ConfigError, LayoutError
from turnout.wire.step_counts import StepCounts, as_step_counts


def require_whole_steps(options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless FRUGAL with these options moves inactive entries by whole steps."""
    reason = None
    if options.get("weight_decay"):
        reason = f"weight_decay={options['weight_decay']} moves weights by other amounts; set it to 0"
    elif options.get("projector") == "galore":
        reason = "projector='galore' moves every entry by Adam; use 'block', 'columns', 'rows' or 'randk'"
    elif options.get("inactive_rule") == "sgd":
        reason = "inactive_rule='sgd' moves entries by their gradients; use 'sign_sgd' or 'no'"
    if reason is not None:
        raise ConfigError(f"reply='coded' needs entries that move by whole steps, but {reason}.")


def step_counts(
    parameter: Tensor, old: NDArray, steps: int, sizes: tuple[float, float], whole: NDArray | None
) -> Array:
    """Return the parameter as counts of ``steps`` from ``old``; see `StepCounts` for ``whole``.

    ``sizes`` are those of the first step and the last. Raises `ConfigError` if they differ, or anything but
    steps moved an entry.
    """
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"reply='coded': the size of a step went from {sizes[0]:g} to {sizes[1]:g} within a round; keep "
            "lr constant in it, or use reply='dense'."
        )
    new = parameter.detach().cpu().numpy()
    try:
        # The arithmetic has the step in the weights' precision.
        return as_step_counts(new, old, StepCounts(float(new.dtype.type(sizes[0])), steps, whole))
    except LayoutError as error:
        raise ConfigError(
            f"reply='coded': {error} Something beside the optimizer moves the weights; use reply='dense'."
        ) from error
