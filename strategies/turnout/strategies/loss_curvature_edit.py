"""Weight edit by loss curvature, federated (Merullo et al., arXiv 2510.24256).

Clients send sums of K-FAC statistics of some layers; the server adds them up, exactly and in any order, and
keeps of each weight W (out x in) the components of high curvature: with ``A = U_A diag(la) U_A^T`` over
inputs and ``G = U_G diag(lg) U_G^T`` over output gradients, component (i, j) of ``U_G^T W U_A`` has the
curvature ``lg_i la_j``. Directions that only few examples use are flat on average: memorised examples go,
what many share stays. Nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from turnout.strategies.checks import choice, number
from turnout.strategies.exact_sum import ExactSum
from turnout.strategies.intake import read_metrics
from turnout.wire import ConfigError, NDArray, ReplyRejected, as_array, keys, view
from turnout.wire.errors import LayoutError
from turnout.wire.flower import records_of, request

QUERY: Final = "query.curvature"
_MOST_EXAMPLES: Final = 2**40
_LARGEST: Final = 1e30


@dataclass(frozen=True, slots=True)
class Factors:
    """Curvature factors of one layer: ``inputs`` A (n, n) and ``gradients`` G (m, m), float64."""

    inputs: NDArray
    gradients: NDArray


@dataclass(frozen=True, slots=True)
class Edited:
    """An edited weight (out, in), the share of components kept, and the share of the squared norm kept."""

    weight: NDArray
    kept: float
    energy: float


class CurvatureSums:
    """Adds up the clients' statistics as they come: the same factors, to the bit, in any order.

    shapes
        (out, in) of each layer by name; convolutions as matrices.
    weighting
        ``"examples"``: what all examples together would give. ``"balanced"``: each client's G counts alike
        (divided by its trace), so that a small or unusual client's skills weigh as much as others'.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        weighting: Literal["examples", "balanced"] = "examples",
    ) -> None:
        choice("weighting", weighting, ("examples", "balanced"))
        self.shapes, self.weighting = dict(shapes), weighting
        self.examples, self.clients = 0, 0
        self._sums = {
            (name, part): ExactSum(np.zeros(size * (size + 1) // 2))
            for name, (out, into) in self.shapes.items()
            for part, size in (("A", into), ("G", out))
        }

    def fold(self, record: ArrayRecord, examples: int) -> None:
        """Add one client's sums over ``examples``; raise `ReplyRejected` before anything is added."""
        if not 1 <= examples <= _MOST_EXAMPLES:
            raise ReplyRejected(
                "bad-metric", f"num-examples must be in [1, {_MOST_EXAMPLES}], got {examples}."
            )
        vectors = {key: self._checked(record, *key) for key in self._sums}
        for (name, part), vector in vectors.items():
            weight = 1.0
            if self.weighting == "balanced" and part == "G":
                trace = float(vector[_diagonal(self.shapes[name][0])].sum())
                weight = 1.0 / trace if trace > 0 else 0.0
            self._sums[name, part].add(vector, weight)
        self.examples += examples
        self.clients += 1

    def factors(self) -> dict[str, Factors]:
        """Return A and G of each layer. Raises `ConfigError` when no client has sent any."""
        if not self.clients:
            raise ConfigError("no client has sent curvature statistics; without them nothing can be edited.")
        by_client = self.weighting == "balanced"
        return {
            name: Factors(
                _square(self._sums[name, "A"].value(self.examples), into),
                _square(self._sums[name, "G"].value(self.clients if by_client else self.examples), out),
            )
            for name, (out, into) in self.shapes.items()
        }

    def _checked(self, record: ArrayRecord, name: str, part: str) -> NDArray:
        key, size = f"{name}/{part}", self.shapes[name][0 if part == "G" else 1]
        wanted = (size * (size + 1) // 2,)
        if key not in record:
            raise ReplyRejected("wrong-layout", f"array {key!r} is missing.")
        array = record[key]
        if tuple(array.shape) != wanted or array.dtype != "float32":
            raise ReplyRejected("wrong-layout", f"array {key!r} must be float32 of shape {wanted}.")
        try:
            vector = np.asarray(view(array), np.float64)
        except LayoutError as error:
            raise ReplyRejected("wrong-layout", str(error)) from error
        if not (np.abs(vector) < _LARGEST).all():
            raise ReplyRejected(
                "non-finite", f"array {key!r} holds NaN, infinity or values beyond {_LARGEST:g}."
            )
        if (vector[_diagonal(size)] < 0).any():
            raise ReplyRejected("bad-metric", f"array {key!r}: a sum of squares on its diagonal is negative.")
        return vector


def gather_curvature(
    grid: Grid,
    arrays: ArrayRecord,
    layers: Sequence[str],
    *,
    labels: Literal["dataset", "sampled", "expected"] = "dataset",
    weighting: Literal["examples", "balanced"] = "examples",
    nodes: Iterable[int] | None = None,
    timeout: float | None = None,
) -> tuple[CurvatureSums, dict[int, str]]:
    """Ask the clients (``nodes``, None: all there) for the statistics of ``layers`` of the model ``arrays``.

    Returns the sums, and why a node's reply was not used. Each reply is added and dropped as it comes; per
    layer it has ``4 (n (n + 1) / 2 + m (m + 1) / 2)`` bytes. Raises `ConfigError` for layers without a
    weight.
    """
    sums = CurvatureSums(weight_shapes(arrays, layers), weighting)
    config = ConfigRecord({"layers": list(layers), "labels": labels, keys.SERVER_ROUND: 1})
    content = RecordDict({keys.ARRAYS: arrays, keys.CONFIG: config})
    asked = sorted(grid.get_node_ids()) if nodes is None else list(nodes)
    messages = [request(content, dst_node_id=node, message_type=QUERY) for node in asked]
    missing = dict.fromkeys(asked, "no reply in time")
    for reply in grid.send_and_receive(messages, timeout=timeout):
        node = reply.metadata.src_node_id
        if node not in missing:  # A second reply, or a stranger's.
            continue
        try:
            _fold_reply(sums, reply)
            del missing[node]
        except ReplyRejected as refused:
            missing[node] = f"{refused.reason}: {refused}"
    return sums, missing


def _fold_reply(sums: CurvatureSums, reply: Message) -> None:
    if reply.has_error():
        raise ReplyRejected("client-error", reply.error.reason or f"error code {reply.error.code}")
    examples = read_metrics(reply.content).get(keys.NUM_EXAMPLES, math.nan)
    if not float(examples).is_integer():
        raise ReplyRejected("bad-metric", f"num-examples must be a whole number, got {examples!r}.")
    records = records_of(reply.content, ArrayRecord)
    if keys.CURVATURE not in records:
        raise ReplyRejected("wrong-layout", f"record {keys.CURVATURE!r} is missing.")
    sums.fold(records[keys.CURVATURE], int(examples))


def weight_shapes(arrays: ArrayRecord, layers: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return (out, in) of each layer's weight; `ConfigError` for a layer without one, or for no layer."""
    matrices = [name.removesuffix(".weight") for name, a in arrays.items() if len(a.shape) in (2, 4)]
    known = [name for name in matrices if f"{name}.weight" in arrays]
    for name in layers or [""]:
        if name not in known:
            raise ConfigError(
                f"layers: {name!r} has no weight matrix; this model has {', '.join(known) or 'none'}."
            )
    shapes = {name: tuple(arrays[f"{name}.weight"].shape) for name in layers}
    return {name: (shape[0], math.prod(shape[1:])) for name, shape in shapes.items()}


def edit_weight(weight: NDArray, factors: Factors, rho: float) -> Edited:
    """Keep the components of highest curvature that make up the share ``rho`` of the layer's curvature.

    ``weight`` (out, in). rho = 1 keeps everything, 0 nothing. The scales of A and G do not matter.
    """
    number("rho", rho, "from 0 to 1", least=0.0, most=1.0)
    if rho == 1.0:
        return Edited(weight, 1.0, 1.0)
    a, basis_a = _eigen(factors.inputs)
    g, basis_g = _eigen(factors.gradients)
    mask = select_pairs(g, a, rho)
    whole = basis_g.T @ np.asarray(weight, np.float64) @ basis_a
    part = np.where(mask, whole, 0.0)
    total = float(np.sum(whole * whole))
    energy = float(np.sum(part * part)) / total if total else 1.0
    edited = (basis_g @ part @ basis_a.T).astype(weight.dtype)
    return Edited(edited, float(mask.mean()), energy)


def select_pairs(g: NDArray, a: NDArray, rho: float) -> NDArray:
    """Return which pairs (i, j) are kept, shape (m, n): the fewest of largest ``g_i a_j`` with the share rho.

    Pairs of equal mass are taken in row order.
    """
    mass = np.outer(g, a)
    order = np.argsort(-mass, axis=None, kind="stable")
    reached = np.cumsum(mass.reshape(-1)[order])
    kept = int(np.searchsorted(reached, rho * reached[-1])) + 1 if rho > 0 else 0
    mask = np.zeros(mass.size, np.bool_)
    mask[order[:kept]] = True
    return mask.reshape(mass.shape)


def edit_arrays(
    arrays: ArrayRecord, factors: Mapping[str, Factors], rho: float
) -> tuple[ArrayRecord, dict[str, Edited]]:
    """Return the model with its layers in ``factors`` edited, the rest shared; and what became of each."""
    edited: dict[str, Edited] = {}
    record = ArrayRecord()
    for name, array in arrays.items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in factors:
            weight = view(array)
            edited[layer] = edit_weight(weight.reshape(len(weight), -1), factors[layer], rho)
            array = as_array(np.ascontiguousarray(edited[layer].weight.reshape(weight.shape)))
        record[name] = array
    return record, edited


def _eigen(matrix: NDArray) -> tuple[NDArray, NDArray]:
    """Return eigenvalues, descending and not below 0, and eigenvectors as columns."""
    values, vectors = np.linalg.eigh(matrix)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def _diagonal(size: int) -> NDArray:
    """Return where a packed upper triangle of ``size`` rows has its diagonal."""
    rows = np.arange(size)
    places: NDArray = rows * size - rows * (rows - 1) // 2
    return places


def _square(packed: NDArray, size: int) -> NDArray:
    whole = np.zeros((size, size))
    whole[np.triu_indices(size)] = packed
    return whole + np.triu(whole, 1).T
