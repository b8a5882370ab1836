"""Continual learning in field space: posteriors over binary weights, merged (Li et al., arXiv 2212.02846).

A weight w = +-1 has a field theta with ``E[w] = tanh(beta theta)``. Clients train the fields against a prior
at the temperature of the round; the server merges the posteriors. What is deployed is sign(theta), 1 bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from turnout.strategies.array_api import array_namespace
from turnout.strategies.checks import choice, number, unused, whole_number
from turnout.strategies.fedavg import FedAvg
from turnout.strategies.rounds import Instruction, Reply
from turnout.wire import as_sign_array, keys, register, view

_FIELDS = "theta"  # What the layers of binary weights call their parameter.
_SATURATED = 1 - 1e-7


@register("field-space-continual", "strategy", "2212.02846")
@dataclass(kw_only=True)
class FieldSpaceContinual(FedAvg):
    """Merges the clients' fields; parameters that are no fields are averaged as in FedAvg.

    merge
        ``"log-odds"``: the mean of the fields, a product of experts. ``"posterior-product"``: the prior plus
        all clients' changes, which counts every client's evidence, with equal weights; for disjoint data.
        ``"magnetisation"``: the mean of the weights' means.
    temperature
        ``"annealed"``: beta = 10 tanh(0.1 + 2 r / total_rounds) in round r, up to 9.7; the sharpening is what
        protects earlier tasks. ``"constant"``: ``beta`` throughout.
    beta
        The constant inverse temperature.
    total_rounds
        Rounds over which the temperature is annealed: those of the whole sequence of tasks.
    kl_weight
        Weight of the divergence from the prior, per client's data set.
    prior
        ``"round"``: the model that is sent, at no cost. ``"task"``: the model from before the present task,
        which is sent as well.
    rounds_per_task
        How long a task lasts, for ``prior = "task"``.
    moments
        ``"keep"``: each client goes on with its own moments of Adam, 8 bytes a parameter on its disk; across
        tasks they damp the first steps of a new one, and earlier tasks are protected better. ``"reset"``:
        they start anew each round; for clients that come rarely, whose moments would be stale.
    """

    merge: Literal["log-odds", "posterior-product", "magnetisation"] = "log-odds"
    temperature: Literal["annealed", "constant"] = "annealed"
    beta: float = 1.0
    total_rounds: int = 30
    kl_weight: float = 0.0
    prior: Literal["round", "task"] = "round"
    rounds_per_task: int = 10
    moments: Literal["reset", "keep"] = "reset"

    state_names: ClassVar[tuple[str, ...]] = ("task_prior",)
    local_updates: ClassVar[tuple[str, ...]] = ("field-space",)

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("merge", self.merge, ("log-odds", "posterior-product", "magnetisation"))
        choice("temperature", self.temperature, ("annealed", "constant"))
        number("beta", self.beta, "a positive number", above=0.0)
        whole_number("total_rounds", self.total_rounds, 1)
        number("kl_weight", self.kl_weight, "a number of at least 0", least=0.0)
        choice("prior", self.prior, ("round", "task"))
        whole_number("rounds_per_task", self.rounds_per_task, 1)
        choice("moments", self.moments, ("reset", "keep"))
        unused("field-space-continual", "server_lr", self.server_lr, 1.0)
        if self.merge == "posterior-product":
            choice("weighting (the posterior product counts all clients alike)", self.weighting, ("uniform",))

    def setup(self) -> None:
        """Take the initial fields as the first task's prior."""
        xp = array_namespace(self.x)
        self._mask: Any = None
        self._beta = self.inverse_temperature(1)
        self.task_prior = xp.asarray(self.x, copy=True) if self.prior == "task" else xp.zeros_like(self.x[:0])

    def inverse_temperature(self, server_round: int) -> float:
        """Return beta of ``server_round``; after the last of the sequence it stays."""
        if self.temperature == "constant":
            return self.beta
        return float(10.0 * np.tanh(0.1 + 2.0 * min(server_round, self.total_rounds) / self.total_rounds))

    def select(self, server_round: int, available: Sequence[int]) -> dict[int, Instruction]:
        """Send the temperature and, at the beginning of a task, renew the prior."""
        self._beta = self.inverse_temperature(server_round)
        config: dict[str, Any] = {keys.TEMPERATURE: self._beta, keys.KL_WEIGHT: self.kl_weight}
        if self.moments == "keep":
            config[keys.KEEP_MOMENTS] = True
        vectors = {}
        if self.prior == "task":
            if (server_round - 1) % self.rounds_per_task == 0:
                self.task_prior = array_namespace(self.x).asarray(self.x, copy=True)
            vectors = {keys.PRIOR: self.task_prior}
        instruction = Instruction("field-space", config=config, vectors=vectors)
        return dict.fromkeys(available, instruction)

    def fold(self, reply: Reply) -> float:
        """Add the client's change of the fields, or its weights' means."""
        if self.merge == "magnetisation":
            xp = array_namespace(self.x)
            theta = self.x + reply.update
            means = xp.where(self._is_field(), xp.tanh(self._beta * theta), theta)
            reply.update, reply.peak = means, float(xp.max(xp.abs(means)))
        return super().fold(reply)

    def finish(self, server_round: int) -> Any:
        """Return the merged posterior; nobody came: the model stays."""
        if not self._total or self.merge == "log-odds":
            return super().finish(server_round)
        xp = array_namespace(self.x)
        mean = self.sum.drain(self._total)
        if self.merge == "posterior-product":
            return self.step(xp.where(self._is_field(), mean * len(self._weights), mean))
        theta = xp.atanh(xp.clip(mean, -_SATURATED, _SATURATED)) / self._beta
        return xp.astype(xp.where(self._is_field(), theta, mean), self.x.dtype)

    def diagnostics(self) -> dict[str, float]:
        """The round's inverse temperature, and the mean variance s of a weight under it: 0 is all certain."""
        xp = array_namespace(self.x)
        spread = 1.0 - xp.tanh(self._beta * self.x) ** 2
        return {"inverse-temperature": self._beta, "mean-variance": float(xp.mean(spread))}

    def deployed(self) -> ArrayRecord:
        """Return the model as it is deployed: fields as their signs, one bit each; any client can load it."""
        arrays = self.arrays()
        record = ArrayRecord()
        for name, array in arrays.items():
            record[name] = as_sign_array(view(array)) if _names_field(name) else array
        return record

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every available client to evaluate the deployed model, which travels as bits."""
        return super().configure_evaluate(server_round, self.deployed(), config, grid)

    def _is_field(self) -> Any:
        """Return which numbers of the vector are fields; all of them where no names are known."""
        if self._layout is None:
            return True
        if self._mask is None:
            named = [np.full(spec.size, _names_field(spec.name)) for spec in self._layout.tensors]
            self._mask = np.concatenate(named)
        return self._mask


def _names_field(name: str) -> bool:
    return name.rpartition(".")[2] == _FIELDS
