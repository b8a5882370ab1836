"""How the clients of one exchange are run: what every executor offers to the grid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable

from flwr.app import Message

from turnout.simulation.clients import LocalClients
from turnout.strategies.cohort import Batch, Cohort


class Executor(ABC):
    """Runs clients and hands over their replies while holding only a bounded number of them."""

    def __init__(self, clients: LocalClients) -> None:
        self.clients = clients

    def started(self) -> Executor:
        """Return who runs the clients from now on: this executor, ready to, or another if it cannot."""
        return self

    @abstractmethod
    def run(
        self, requests: Iterable[Message], *, server_round: int, deadline: float | None, ordered: bool
    ) -> Generator[Message, None, None]:
        """Yield one reply per request: in the order of the requests if ``ordered``, else as they complete.

        Nothing that completes after ``deadline`` (on the clock of `time.monotonic`) is yielded, and clients
        not started by then are not started. Closing the generator has the same effect.
        """

    @property
    def trains_cohorts(self) -> bool:
        """Whether `train_cohort` can be used."""
        return False

    def train_cohort(self, cohort: Cohort, *, deadline: float | None) -> Generator[Batch, None, None]:
        """Train all clients of ``cohort`` and yield their replies in bulk, as they complete.

        Clients that did not complete by ``deadline`` are in no batch.
        """
        raise RuntimeError(f"{type(self).__name__} trains no cohorts; look at trains_cohorts first.")

    @abstractmethod
    def settle(self) -> None:
        """Wait until no client is running, those whose reply came too late included."""

    def states_replaced(self) -> None:
        """Note that the clients' states were replaced from outside, by a checkpoint."""

    def trim_states(self) -> None:
        """Let go of states in memory that are more than there should be; they are read from files again."""
        self.clients.states.trim()
