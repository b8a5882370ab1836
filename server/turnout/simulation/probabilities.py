"""How often each client takes part: the vectors ``p_1 .. p_N`` that participation models are built from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from turnout.wire.errors import ConfigError

Probabilities = npt.NDArray[np.float64]
"""How often each client takes part, shape (num_clients,)."""

_PREFERENCE_STREAM: Final = 2


def given(
    values: Sequence[float] | npt.NDArray[np.floating] | Probabilities,
    *,
    num_clients: int | None = None,
    allow_zero: bool = False,
) -> Probabilities:
    """Check probabilities the user states, client 0 first, and return them as a read-only vector.

    A probability of 0 means a client that never comes. It is refused, because ``1/p`` is used as a weight
    and a forgotten value often reads as 0, unless ``allow_zero`` says that it is meant. Raises `ConfigError`
    naming the client for a value outside (0, 1], NaN, or a number of values other than ``num_clients``.
    """
    try:
        vector = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"probabilities must be numbers in (0, 1], one per client: {error}.") from error
    if vector.ndim != 1 or vector.size == 0:
        raise ConfigError(
            f"probabilities must be a list with one number per client, got shape {vector.shape}; "
            "use constant(num_clients, p) when all clients share one."
        )
    if num_clients is not None and vector.size != num_clients:
        raise ConfigError(
            f"probabilities has {vector.size} values but num_clients is {num_clients}; give one per client."
        )
    # Written so that NaN is refused: every comparison with it is false.
    bad = ~((vector >= 0.0) & (vector <= 1.0))
    if bad.any():
        client = int(np.argmax(bad))
        raise ConfigError(
            f"probabilities: client {client} has p={vector[client]:g}, which is no probability; "
            "use a number above 0 and at most 1."
        )
    if not allow_zero and not vector.all():
        client = int(np.argmin(vector))
        raise ConfigError(
            f"probabilities: client {client} has p=0, so it can never take part; raise it above 0, "
            "leave the client out, or pass allow_zero=True if it is meant to stay away."
        )
    vector.flags.writeable = False
    return vector


def constant(num_clients: int, p: float) -> Probabilities:
    """Return the same probability for every client.

    p
        How often each takes part, in (0, 1].
    """
    _check_fraction("p", p)
    return given(np.full(check_num_clients(num_clients), p))


def two_group(num_clients: int, p_low: float, p_high: float = 1.0) -> Probabilities:
    """Return ``p_high`` for the first half of the clients and ``p_low`` for the second.

    The split of FedStale's experiments (arXiv 2405.04171), where the first half always takes part. With an
    odd number of clients the one in the middle has ``p_high``.

    p_low
        How often the second half takes part.
    p_high
        How often the first half takes part.
    """
    _check_fraction("p_low", p_low)
    _check_fraction("p_high", p_high)
    rare = check_num_clients(num_clients) // 2
    return given(np.repeat([p_high, p_low], [num_clients - rare, rare]))


def label_correlated(
    label_distribution: npt.ArrayLike,
    mean: float = 0.1,
    minimum: float = 0.02,
    alpha: float = 0.1,
    seed: int = 0,
) -> Probabilities:
    """Draw probabilities that depend on the labels a client holds (FedAU, arXiv 2306.03401).

    One ``q ~ Dirichlet(alpha)`` over the C classes is drawn for all clients, and
    ``p_i = min(1, max(minimum, mean * C * <d_i, q>))`` where ``d_i`` is row ``i`` of ``label_distribution``,
    of shape (num_clients, C): the fraction of client i's examples in each class. A client without data has a
    row of zeros and gets ``p_i = 0``; pass ``allow_zero=True`` to the participation model if there are such.

    Raises `ConfigError` for rows that do not sum to 1 (or 0) and for settings out of range.

    mean
        Average of p_i over clients whose labels are spread evenly.
    minimum
        The least p_i of a client that has data.
    alpha
        Concentration of q: the lower, the more a few labels decide who comes.
    seed
        Seeds q; the run's seed unless it is given.
    """
    rows = np.asarray(label_distribution, dtype=np.float64)
    if rows.ndim != 2 or rows.size == 0:
        raise ConfigError(f"label_distribution must have shape (num_clients, classes), got {rows.shape}.")
    sums = rows.sum(axis=1)
    has_data = sums != 0.0
    bad = ~((rows >= 0.0).all(axis=1) & (~has_data | (np.abs(sums - 1.0) < 1e-6)))
    if bad.any():
        client = int(np.argmax(bad))
        raise ConfigError(
            f"label_distribution: client {client} has {rows[client].tolist()}, which sums to "
            f"{sums[client]:g}; give its label counts divided by their total (all zeros without data)."
        )
    _check_fraction("mean", mean)
    _check_fraction("minimum", minimum)
    if not 0.0 < alpha < np.inf:
        raise ConfigError(f"alpha, the Dirichlet concentration, must be above 0 and finite, got {alpha:g}.")
    classes = rows.shape[1]
    # A stream of its own: a partition drawn with the same seed must not hand client 0 this very preference.
    preference = np.random.default_rng([_PREFERENCE_STREAM, check_seed(seed)]).dirichlet(
        np.full(classes, alpha)
    )
    p = np.minimum(1.0, np.maximum(minimum, mean * classes * (rows @ preference)))
    return given(np.where(has_data, p, 0.0), allow_zero=True)


def check_num_clients(num_clients: int) -> int:
    """Return ``num_clients`` if it is an integer of at least 1, else raise `ConfigError`."""
    if isinstance(num_clients, bool) or not isinstance(num_clients, (int, np.integer)) or num_clients < 1:
        raise ConfigError(f"num_clients must be an integer of at least 1, got {num_clients!r}.")
    return int(num_clients)


def check_seed(seed: int) -> int:
    """Return ``seed`` if it is an integer of at least 0, else raise `ConfigError`."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ConfigError(f"seed must be an integer of at least 0, got {seed!r}.")
    return int(seed)


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise ConfigError(f"{name} must be above 0 and at most 1, got {value:g}.")
