"""How examples are spread over clients: one frozen dataclass per partitioner, registered by name.

A partition is a pure function of the partitioner's fields, the labels and a seed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final, Protocol

import numpy as np

from turnout.tasks.validation import check_count, check_number
from turnout.wire.errors import ConfigError, unknown_name
from turnout.wire.registry import find, register

IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Partition:
    """Examples of each client.

    ``indices[i]`` are the rows of client i; ``labels`` are the labels as the clients see them, which differ
    from the original ones only under a partitioner that changes labels.
    """

    indices: tuple[IntArray, ...]
    labels: IntArray

    @property
    def sizes(self) -> IntArray:
        """Number of examples of each client, shape (num_clients,)."""
        return np.array([len(rows) for rows in self.indices], dtype=np.int64)

    def class_counts(self, num_classes: int | None = None) -> IntArray:
        """Return how many examples of each class each client has, shape (num_clients, num_classes)."""
        classes = int(self.labels.max(initial=-1)) + 1 if num_classes is None else num_classes
        return np.stack([np.bincount(self.labels[rows], minlength=classes) for rows in self.indices])


class Partitioner(Protocol):
    """Splits examples by their labels; ``groups`` names each example's natural client where there is one."""

    def split(
        self, labels: IntArray, num_clients: int, *, seed: int, groups: IntArray | None = None
    ) -> Partition:
        """Return the partition drawn under ``seed``."""


def make_partitioner(name: str, **options: Any) -> Partitioner:
    """Return the partitioner ``name`` with its ``options``.

    Raises `ConfigError` for an unknown name, an unknown option (suggesting the nearest) or a bad value.
    """
    target = find("partitioner", name).target
    known = {field.name for field in fields(target)}
    for option in options:
        if option not in known:
            raise unknown_name(f"option of partition {name!r}", option, known)
    partitioner: Partitioner = target(**options)
    return partitioner


def _check_room(num_examples: int, num_clients: int, min_examples: int) -> None:
    check_count("num_clients", num_clients, low=1)
    if num_examples < num_clients * min_examples:
        raise ConfigError(
            f"num_clients={num_clients} with min_examples={min_examples} needs {num_clients * min_examples} "
            f"examples but there are {num_examples}; lower one of them."
        )


def _deal_classes(labels: IntArray, shares: np.ndarray[Any, Any], rng: np.random.Generator) -> list[IntArray]:
    """Cut each class's shuffled rows in proportion to its column of ``shares`` (num_clients, classes)."""
    pieces: list[list[IntArray]] = [[] for _ in range(len(shares))]
    for label in range(shares.shape[1]):
        rows = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.cumsum(shares[:, label]) / shares[:, label].sum() * len(rows)).astype(np.int64)
        for client, piece in enumerate(np.split(rows, cuts[:-1])):
            pieces[client].append(piece)
    return [np.concatenate(parts) for parts in pieces]


def _fill_up(clients: list[IntArray], minimum: int, rng: np.random.Generator) -> list[IntArray]:
    """Give clients below ``minimum`` random examples of the currently largest client, one at a time."""
    sizes = np.array([len(rows) for rows in clients])
    for client in np.flatnonzero(sizes < minimum):
        while sizes[client] < minimum:
            donor = int(sizes.argmax())
            taken = int(rng.integers(sizes[donor]))
            clients[client] = np.append(clients[client], clients[donor][taken])
            clients[donor] = np.delete(clients[donor], taken)
            sizes[client] += 1
            sizes[donor] -= 1
    return clients


def _partition(clients: list[IntArray], labels: IntArray) -> Partition:
    return Partition(tuple(np.sort(rows).astype(np.int64) for rows in clients), labels)


@register("iid", kind="partitioner", summary="Shuffled examples in equal parts (sizes differ by at most one)")
@dataclass(frozen=True)
class Iid:
    """Shuffled examples in equal parts; sizes differ by at most one."""

    def split(
        self, labels: IntArray, num_clients: int, *, seed: int, groups: IntArray | None = None
    ) -> Partition:
        """Return the partition drawn under ``seed``."""
        _check_room(len(labels), num_clients, 1)
        order = np.random.default_rng(seed).permutation(len(labels))
        return _partition(list(np.array_split(order, num_clients)), labels)


@register("dirichlet", kind="partitioner", summary="Each class is cut over the clients by a Dirichlet draw")
@dataclass(frozen=True)
class Dirichlet:
    """For each class, draw p ~ Dirichlet(alpha) over the clients and cut the class's shuffled rows by p.

    alpha
        Concentration: 0.1 is hard, 0.5 usual, 100 near IID.
    min_examples
        A client that ends below it then receives random examples of whichever client is largest at that
        moment, one at a time, until it has enough.
    """

    alpha: float = 0.5
    min_examples: int = 1

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, low=0, open_low=True)
        check_count("min_examples", self.min_examples, low=0)

    def split(
        self, labels: IntArray, num_clients: int, *, seed: int, groups: IntArray | None = None
    ) -> Partition:
        """Return the partition drawn under ``seed``."""
        _check_room(len(labels), num_clients, self.min_examples)
        rng = np.random.default_rng(seed)
        classes = int(labels.max()) + 1
        shares = rng.dirichlet(np.full(num_clients, self.alpha), size=classes).T
        return _partition(_fill_up(_deal_classes(labels, shares, rng), self.min_examples, rng), labels)


@register("label-mix", kind="partitioner", paper="2306.03401", summary="Each client's label mix ~ Dirichlet")
@dataclass(frozen=True)
class LabelMix:
    """FedAU's recipe (arXiv 2306.03401): each client's label mix ~ Dirichlet(alpha) over the classes.

    Each class's examples are split over the clients in proportion to its column of the (num_clients, classes)
    matrix of mixes. Sizes differ.

    alpha
        Concentration of a client's mix of labels: the lower, the fewer labels it has.
    min_examples
        Clients may be empty unless this asks for more (then as in `Dirichlet`).
    """

    alpha: float = 0.1
    min_examples: int = 0

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, low=0, open_low=True)
        check_count("min_examples", self.min_examples, low=0)

    def split(
        self, labels: IntArray, num_clients: int, *, seed: int, groups: IntArray | None = None
    ) -> Partition:
        """Return the partition drawn under ``seed``."""
        _check_room(len(labels), num_clients, self.min_examples)
        rng = np.random.default_rng(seed)
        mixes = rng.dirichlet(np.full(int(labels.max()) + 1, self.alpha), size=num_clients)
        # A class that every mix rounds to zero is spread evenly rather than lost.
        mixes[:, mixes.sum(axis=0) == 0] = 1.0
        return _partition(_fill_up(_deal_classes(labels, mixes, rng), self.min_examples, rng), labels)


@register("shards", kind="partitioner", paper="1602.05629", summary="Sorted by label, equal shards dealt out")
@dataclass(frozen=True)
class Shards:
    """Sort by label, cut into equal shards, deal some to each client (arXiv 1602.05629).

    shards_per_client
        How many each gets; about so many labels it has.
    """

    shards_per_client: int = 2

    def __post_init__(self) -> None:
        check_count("shards_per_client", self.shards_per_client, low=1)

    def split(
        self, labels: IntArray, num_clients: int, *, seed: int, groups: IntArray | None = None
    ) -> Partition:
        """Return the partition drawn under ``seed``."""
        _check_room(len(labels), num_clients, self.shards_per_client)
        rng = np.random.default_rng(seed)
        shuffled = rng.permutation(len(labels))
        by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
        shards = np.array_split(by_label, num_clients * self.shards_per_client)
        deal = rng.permutation(len(shards)).reshape(num_clients, self.shards_per_client)
        return _partition([np.concatenate([shards[i] for i in hand]) for hand in deal], labels)


@register("natural", kind="partitioner", summary="One client per value of the data's own client column")
@dataclass(frozen=True)
class Natural:
    """One client per distinct group id, in sorted order.

    min_examples
        Groups with fewer examples are left out.
    """

    min_examples: int = 1

    def __post_init__(self) -> None:
        check_count("min_examples", self.min_examples, low=1)

    def split(
        self, labels: IntArray, num_clients: int, *, seed: int, groups: IntArray | None = None
    ) -> Partition:
        """Return one client per group; raises `ConfigError` unless ``num_clients`` is how many there are."""
        if groups is None:
            raise ConfigError("partition='natural' needs data with client ids; use 'dirichlet' or 'shards'.")
        kept = self.kept(groups)
        if len(kept) != num_clients:
            raise ConfigError(
                f"num_clients={num_clients} but the data has {len(kept)} natural clients with at least "
                f"{self.min_examples} examples; use num_clients={len(kept)}."
            )
        return _partition([np.flatnonzero(groups == group) for group in kept], labels)

    def kept(self, groups: IntArray) -> IntArray:
        """Return the distinct ids in ``groups`` that become clients."""
        ids, counts = np.unique(groups, return_counts=True)
        large: IntArray = ids[counts >= self.min_examples]
        return large


def natural_count(partition: Partitioner, groups: IntArray | None) -> int:
    """Return how many clients the data themselves have; `ConfigError` for a partition that needs a number."""
    if groups is None or not isinstance(partition, Natural):
        raise ConfigError("num_clients is missing: this partition does not say how many clients there are.")
    return len(partition.kept(groups))


_PAIR_SIZE: Final = 2


@register("label-swap", kind="partitioner", paper="2405.04171", summary="IID, then two labels partly swapped")
@dataclass(frozen=True)
class LabelSwap:
    """FedStale's concept shift (arXiv 2405.04171): IID split, then ``fraction`` of two labels is swapped.

    In each client, that share of the examples of either label (rounded, chosen at random) takes the other
    label. The defaults are the paper's for MNIST.

    fraction
        Share of the examples that change their label; 0 is IID.
    even
        The pair of labels that clients 0, 2, ... swap.
    odd
        The pair of labels that clients 1, 3, ... swap.
    """

    fraction: float = 0.4
    even: tuple[int, int] = (0, 1)
    odd: tuple[int, int] = (8, 9)

    def __post_init__(self) -> None:
        check_number("fraction", self.fraction, low=0, high=1)
        for field, pair in (("even", self.even), ("odd", self.odd)):
            for label in pair:
                check_count(field, label, low=0)
            if len(pair) != _PAIR_SIZE or pair[0] == pair[1]:
                raise ConfigError(f"{field}={pair!r} is not possible; give two different labels.")

    def split(
        self, labels: IntArray, num_clients: int, *, seed: int, groups: IntArray | None = None
    ) -> Partition:
        """Return the partition drawn under ``seed``; its ``labels`` are the swapped ones."""
        iid = Iid().split(labels, num_clients, seed=seed)
        rng = np.random.default_rng([seed, 1])
        swapped = labels.copy()
        for client, rows in enumerate(iid.indices):
            first, second = self.odd if client % 2 else self.even
            for old, new in ((first, second), (second, first)):
                candidates = rows[labels[rows] == old]
                chosen = rng.choice(candidates, round(self.fraction * len(candidates)), replace=False)
                swapped[chosen] = new
        return Partition(iid.indices, swapped)
