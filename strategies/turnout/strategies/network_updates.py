"""TeRA's diagonals (arXiv 2509.03234) averaged as dense updates, and fitted again by least squares.

The update of a layer is a frozen tensor network with N trained diagonals d_n between its factors and its
core: linear in each of them, but not in all. The server knows the network as the clients do, so that it can
average what the diagonals stand for. Which diagonals come nearest to the average has no closed form: each d_n
in turn is the solution of a small linear system, the others fixed (alternating least squares), from the
diagonals that were sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from turnout.strategies.dense_updates import DenseUpdates, FactorLayer, Factors
from turnout.strategies.least_gradient import least_gradient
from turnout.wire import NDArray, ParameterLayout

_SWEEPS: Final = 50
# A sweep that gains less than this share of the dense update's square is the last one.
_GAIN: Final = 1e-9
# Singular values of a mode's system below this share of the largest are rounding.
_CUT: Final = 1e-10


@dataclass(frozen=True)
class FrozenNetwork:
    """Core (R_1, ..., R_N) and factors (I_n, R_n), of which the first ``outputs`` make up d_out."""

    core: NDArray
    factors: Sequence[NDArray]
    outputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        sides = [len(factor) for factor in self.factors]
        return int(np.prod(sides[: self.outputs])), int(np.prod(sides[self.outputs :]))

    def value(self, core: NDArray) -> NDArray:
        """Return the dense update, (d_out, d_in), of a core that the diagonals have scaled."""
        return _modes(core, self.factors).reshape(self.shape)

    def inner(self, dense: NDArray) -> NDArray:
        """Return the adjoint of `value`: ``dense`` seen from the core, (R_1, ..., R_N)."""
        tensor = dense.reshape([len(factor) for factor in self.factors])
        return _modes(tensor, [factor.T for factor in self.factors])


class NetworkUpdates(DenseUpdates):
    """Dense updates of networks inside, diagonals ``NAME.0``, ``NAME.1``, ... outside.

    ``networks`` gives the frozen networks by layer; it is asked when a run starts and when one resumes.
    """

    option = "exact-als"

    def __init__(self, networks: Callable[[], Mapping[str, FrozenNetwork]], name: str, scale: float) -> None:
        super().__init__(scale)
        self._ask = networks
        self._name = name
        self._networks: Mapping[str, FrozenNetwork] = {}

    @property
    def needs(self) -> str:
        """The networks."""
        return f"networks with diagonals {self._name!r}"

    def layers(self, layout: ParameterLayout) -> Iterator[FactorLayer]:
        """Yield the layers that have a network."""
        self._networks = self._ask()
        for path, network in self._networks.items():
            names = [f"{path}.{self._name}.{n}" for n in range(len(network.factors))]
            yield FactorLayer(path, tuple(names), network.shape)

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Take a checkpoint's diagonals over, and the networks as they are by now."""
        self._networks = self._ask()
        super().load_state_dict(tree)

    def product(self, factors: Factors, path: str) -> NDArray:
        """Return the network's value."""
        network = self._networks[path]
        return network.value(_scaled(network.core, factors))

    def factorised(self, dense: NDArray, before: Factors, path: str) -> Factors:
        """Return diagonals near ``before`` that fit ``dense``; no sweep makes the fit worse."""
        network, diagonals = self._networks[path], list(before)
        grams = [factor.T @ factor for factor in network.factors]
        wanted, square = network.inner(dense), float(np.square(dense).sum())
        error = np.inf
        for _ in range(_SWEEPS):
            for n, gram in enumerate(grams):
                slices = _scaled(network.core, diagonals, leaving=n)
                others = _modes(slices, grams, leaving=n)
                own = _rows(slices, n)
                system = gram * (own @ _rows(others, n).T)
                missing = (own * _rows(wanted, n)).sum(axis=1) - system @ diagonals[n]
                diagonals[n] = diagonals[n] + np.linalg.lstsq(system, missing, rcond=_CUT)[0]
            core = _scaled(network.core, diagonals)
            before_sweep, error = error, square + float((core * (_modes(core, grams) - 2 * wanted)).sum())
            if before_sweep - error <= _GAIN * square:
                break
        return tuple(diagonals)

    def motion(self, factors: Factors, gradient: Factors, path: str) -> NDArray:
        """Return the sum over n of the network with g_n in place of d_n."""
        network = self._networks[path]
        cores = (_scaled(network.core, [*factors[:n], g, *factors[n + 1 :]]) for n, g in enumerate(gradient))
        return network.value(sum(cores, np.zeros_like(network.core)))

    def gradient(self, factors: Factors, dense: NDArray, path: str) -> Factors:
        """Return the least gradient that minimises the distance of its `motion` from ``dense``."""
        network = self._networks[path]

        def adjoint(residual: NDArray) -> Factors:
            inner = network.inner(residual)
            return tuple(
                _rows(inner * _scaled(network.core, factors, leaving=n), n).sum(axis=1)
                for n in range(len(factors))
            )

        return least_gradient(
            factors, dense, lambda direction: self.motion(factors, direction, path), adjoint
        )


def _modes(tensor: NDArray, matrices: Sequence[NDArray], leaving: int = -1) -> NDArray:
    """Multiply each mode n of ``tensor`` but ``leaving`` by ``matrices[n]``, shape (new, old)."""
    for n, matrix in enumerate(matrices):
        if n != leaving:
            tensor = np.moveaxis(np.tensordot(matrix, tensor, axes=(1, n)), 0, n)
    return tensor


def _scaled(core: NDArray, diagonals: Sequence[NDArray], leaving: int = -1) -> NDArray:
    """Return ``core`` with index r of each mode n but ``leaving`` times entry r of ``diagonals[n]``."""
    for n, diagonal in enumerate(diagonals):
        if n != leaving:
            core = core * diagonal.reshape([-1 if m == n else 1 for m in range(core.ndim)])
    return core


def _rows(tensor: NDArray, mode: int) -> NDArray:
    """Return ``tensor`` as a matrix whose rows are its slices along ``mode``."""
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)
