"""Vectors that clients send beside their reply and get back as a mean: the state of their optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from turnout.strategies.exact_sum import ExactSum
from turnout.strategies.rounds import Instruction
from turnout.wire import CheckpointError, NDArray, keys


class CarriedVectors:
    """The means over the participants, by their examples, of the vectors called ``names``, shape (P,) each.

    Until a first round brought some there is nothing to send. A round in which nobody came leaves them alone.
    """

    def __init__(self, names: Sequence[str], like: NDArray) -> None:
        self.names = tuple(names)
        self.means: dict[str, NDArray] = {}
        self.rounds = 0
        self._dtype = like.dtype
        # In the precision of float64: a second moment spans twice the orders of magnitude of a gradient, and
        # one that is rounded to zero beside a first moment that is not makes a step without bounds.
        wide = like.astype(np.float64)
        self._sums = {name: ExactSum(wide) for name in self.names}
        self._examples = 0

    def open_round(self, asked: Mapping[int, Instruction]) -> dict[int, Instruction]:
        """Return the instructions with the means added and the vectors asked for; shared ones stay shared."""
        self._examples = 0
        for total in self._sums.values():
            total.reset()
        if not self.names:
            return dict(asked)
        made: dict[int, Instruction] = {}
        for instruction in asked.values():
            if id(instruction) not in made:
                made[id(instruction)] = self._added(instruction)
        return {node: made[id(instruction)] for node, instruction in asked.items()}

    def _added(self, instruction: Instruction) -> Instruction:
        config = (
            {**instruction.config, keys.CARRIED_ROUNDS: self.rounds} if self.means else instruction.config
        )
        return replace(
            instruction,
            config=config,
            vectors={**instruction.vectors, **self.means},
            extras=(*instruction.extras, *self.names),
        )

    def add(self, vectors: Mapping[str, Any], num_examples: int) -> None:
        """Add the vectors of one accepted reply."""
        if self.names:
            self._examples += num_examples
            for name, total in self._sums.items():
                total.add(vectors[name], num_examples)

    def close_round(self) -> None:
        """Set the means from what was added."""
        if self._examples:
            self.rounds += 1
            self.means = {
                name: total.value(self._examples).astype(self._dtype) for name, total in self._sums.items()
            }

    @property
    def nbytes(self) -> int:
        """Bytes of the means."""
        return sum(mean.nbytes for mean in self.means.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the means and how many rounds made them."""
        return {"rounds": self.rounds, "means": dict(self.means)}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; `CheckpointError` when it holds other vectors."""
        if set(tree["means"]) not in (set(), set(self.names)):
            raise CheckpointError(
                f"the checkpoint carries {sorted(tree['means'])}, this run carries {sorted(self.names)}; "
                "resume with the clients' optimizer and optimizer_state that the run had."
            )
        self.rounds = int(tree["rounds"])
        self.means = {name: np.array(mean) for name, mean in tree["means"].items()}
