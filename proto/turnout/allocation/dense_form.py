"""How a server that averages dense updates gets to them from the tensors that travel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LowRankForm:
    """Products ``scale B A``, or ``scale B (E * A)``.

    ``groups`` are own names of tensors that belong together: A (r, d_in), B (d_out, r) and maybe E (r, 1).
    """

    groups: tuple[tuple[str, ...], ...]
    scale: float


@dataclass(frozen=True, slots=True)
class NetworkForm:
    """``scale`` times a frozen tensor network with trained diagonals, those of ``name.0``, ``name.1``, ..."""

    name: str
    scale: float


@dataclass(frozen=True, slots=True)
class KernelForm:
    """``K |K|`` at the largest entries of a kernel K of two thin matrices, as `turnout.peft.snella` has it.

    The dense update is that plus the tensor ``folded``; the kernel starts anew in every round.
    """

    scale: float


DenseForm = LowRankForm | NetworkForm | KernelForm
"""What dense updates are made of; each adapter with such an option says it of its layers."""
