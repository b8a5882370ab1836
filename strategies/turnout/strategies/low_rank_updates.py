"""Low-rank factors of adapters, found in a model by their names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from turnout.strategies.dense_updates import DenseUpdates, FactorLayer
from turnout.wire import ParameterLayout


class LowRankUpdates(DenseUpdates):
    """Dense updates of factors A (r, d_in), B (d_out, r) and maybe more.

    ``groups`` are own names of tensors of one layer that belong together, A's and B's first.
    """

    def __init__(self, groups: Sequence[Sequence[str]], scale: float) -> None:
        super().__init__(scale)
        self._groups = [tuple(group) for group in groups]

    @property
    def needs(self) -> str:
        """The factors, by name."""
        return f"factors {' and '.join(map(repr, self._groups[0]))}"

    def layers(self, layout: ParameterLayout) -> Iterator[FactorLayer]:
        """Yield the layers that have all factors of a group."""
        shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
        for tensor in layout.tensors:
            path, _, last = tensor.name.rpartition(".")
            for group in self._groups:
                names = tuple(f"{path}.{name}" if path else name for name in group)
                if last == group[0] and all(name in shapes for name in names):
                    yield FactorLayer(path, names, (shapes[names[1]][0], shapes[names[0]][1]))
