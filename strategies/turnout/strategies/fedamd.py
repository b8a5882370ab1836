"""FedAMD: anchors refresh gradients, miners move the model (Wu et al., ICML 2023, arXiv 2206.05891).

In each round every participant is an anchor with probability p_t (uploads one large-batch gradient at x, its
"bullseye", which the server caches) or a miner (runs variance-reduced local steps from the mean bullseye g).
``x <- x + eta * mean over miners of Delta_i``; anchors take effect from the next round on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from turnout.strategies.array_api import array_namespace
from turnout.strategies.checks import choice, number, unused, whole_number
from turnout.strategies.memory import open_memory
from turnout.strategies.memory_mean import MemoryMean
from turnout.strategies.rounds import Instruction, Reply
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import keys, register


@register("fedamd", "strategy", "2206.05891")
@dataclass(kw_only=True)
class FedAMD(StreamingStrategy):
    """Anchor sampling for partial participation.

    anchor_probability
        p in (0, 1) for the constant schedule: each participant's chance to be an anchor. Near
        `suggested_anchor_probability` is safe; small values leave the cache stale.
    schedule
        ``"constant"``: a coin per participant. ``"sequential"``: in every ``period``-th round all
        participants are anchors, else all are miners.
    period
        Length of a sequential cycle in rounds, at least 2.
    cold_start
        Round 1 asks everyone for a bullseye at the initial model, as the algorithm prescribes. A client not
        reached then is left out of g until it has been an anchor.
    memory
        Where bullseyes are cached: ``"ram"``, ``"fp16"``, ``"mmap"`` or ``"mmap:DIRECTORY"``.
    """

    anchor_probability: float = 0.5
    schedule: Literal["constant", "sequential"] = "constant"
    period: int = 2
    cold_start: bool = True
    memory: str = "ram"

    state_names: ClassVar[tuple[str, ...]] = ("bullseyes",)
    local_updates: ClassVar[tuple[str, ...]] = ("anchor", "miner")

    def __post_init__(self) -> None:
        super().__post_init__()
        number("anchor_probability", self.anchor_probability, "in (0, 1)", above=0.0, below=1.0)
        choice("schedule", self.schedule, ("constant", "sequential"))
        whole_number("period", self.period, 2)
        unused("FedAMD", "client_weights", self.client_weights, "uniform")
        open_memory(self.memory)

    def setup(self) -> None:
        """Start with an empty cache."""
        self.bullseyes = MemoryMean(self.x, self.memory)

    def begin_round(self, server_round: int, registered: Iterable[int]) -> None:
        """Open a round with the cache as it stands: this round's anchors do not count yet."""
        super().begin_round(server_round, registered)
        self.bullseyes.begin_round()
        self._miners = self._anchors = 0

    def mean_bullseye(self) -> Any:
        """Return g, the mean of the cached gradients (zero while there is none)."""
        xp = array_namespace(self.x)
        return xp.astype(self.bullseyes.total / max(1, len(self.bullseyes)), self.x.dtype)

    def anchor_nodes(self, server_round: int, available: Sequence[int]) -> set[int]:
        """Return which of ``available`` are anchors; a client's coin does not depend on who else is there."""
        if server_round == 1 and self.cold_start:
            return set(available)
        if self.schedule == "sequential":
            return set(available) if server_round % self.period == 0 else set()
        rows = list(self.clients.rows_of(available))
        coins = self.rng(server_round).random(max(rows, default=0) + 1)
        return {n for n, row in zip(available, rows, strict=True) if coins[row] < self.anchor_probability}

    def select(self, server_round: int, available: Sequence[int]) -> dict[int, Instruction]:
        """Give each participant its role; miners also receive g."""
        anchors = self.anchor_nodes(server_round, available)
        self.bullseyes.expect(self.clients.rows_of(anchors))
        anchor = Instruction("anchor", reply="gradient")
        miner = anchor
        if len(anchors) < len(available):
            miner = Instruction("miner", vectors={keys.BULLSEYE: self.mean_bullseye()})
        return {node: anchor if node in anchors else miner for node in available}

    def fold(self, reply: Reply) -> float:
        """Cache an anchor's gradient, or add a miner's update."""
        if reply.role == "anchor":
            self.bullseyes.store(reply.client, reply.update, largest=reply.peak)
            self._anchors += 1
            return 0.0
        self.sum.add(reply.update, largest=reply.peak)
        self._miners += 1
        return 1.0

    def normaliser(self) -> float:
        """Return the number of miners."""
        return float(self._miners)

    def finish(self, server_round: int) -> Any:
        """Step along the miners' mean update (none: x stays bit for bit) and take over the new gradients."""
        self.bullseyes.commit()
        return self.step(self.sum.drain(self._miners)) if self._miners else self.x

    def diagnostics(self) -> dict[str, float]:
        """Numbers of miners, anchors and cached bullseyes."""
        return {
            "miners": float(self._miners),
            "anchors": float(self._anchors),
            "remembered-clients": float(len(self.bullseyes)),
        }


def suggested_anchor_probability(num_participants: int) -> float:
    """Return p = (2 / (a + 2)) ** (1 / a) for ``a`` participants per round (rule C of the authors' code)."""
    whole_number("num_participants", num_participants, 1)
    return float((2 / (num_participants + 2)) ** (1 / num_participants))
