"""A run computed again from its ledger: the replies that were folded, and no others.

That needs deterministic clients. Then every round's model must come out the same, whatever happened to the
run and whoever took part in it by chance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from turnout.server.recorder import model_sha256
from turnout.server.schema import ClientRoundRow, RoundRow
from turnout.strategies import Callback, RoundReport, StreamingStrategy
from turnout.wire import keys
from turnout.wire.grid import LocalRunGrid
from turnout.wire.replies import encode_reply


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a run is computed again with: everything as it was before its first round.

    ``grid`` runs the same deterministic clients, all of them available in every round, under the ids that
    they had in the run.
    """

    strategy: StreamingStrategy
    grid: Grid
    arrays: ArrayRecord
    train_config: ConfigRecord | None = None


def check_replay(rounds: list[RoundRow], rows: list[ClientRoundRow], replay: Replay) -> Iterator[str]:
    """Compute a run again with the replies of its ledger, up to its first gap; yield what differs."""
    last = next((n for n, row in enumerate(rounds) if row.round != n + 1), len(rounds))
    if not last:
        return
    grid = _ReplayGrid(replay.grid, [row for row in rows if row.round <= last])
    models = _Models()
    replay.strategy.start(
        grid, replay.arrays, num_rounds=last, train_config=replay.train_config, callbacks=[models]
    )
    if models.initial != rounds[0].model_before_sha256:
        yield (
            f"the run began with model {short(rounds[0].model_before_sha256)}, "
            f"the replay with {short(models.initial)}."
        )
    for row, model in zip(rounds, models.after, strict=False):
        if row.model_sha256 != model:
            yield (
                f"round {row.round} ended with model {short(row.model_sha256)}; "
                f"its replies give {short(model)}."
            )
            break  # Those after it follow from it.
    yield from grid.problems


@dataclass
class _Models(Callback):
    """Notes the model's digest before the first round and after each."""

    initial: str = ""
    after: list[str] = field(default_factory=list)

    def on_start(self, strategy: StreamingStrategy, *, num_rounds: int, first_round: int) -> None:
        self.initial = model_sha256(strategy.arrays())

    def on_round_end(self, report: RoundReport) -> None:
        self.after.append(model_sha256(report.arrays))


class _ReplayGrid(LocalRunGrid):
    """Lets those take part who were invited, and those reply who were folded; compares the replies."""

    def __init__(self, grid: Grid, rows: Iterable[ClientRoundRow]) -> None:
        super().__init__()
        self._grid = grid
        self._invited: dict[int, dict[int, ClientRoundRow]] = defaultdict(dict)
        for row in rows:
            self._invited[row.round][row.client] = row
        self._round = 0
        self.problems: list[str] = []

    def start_round(self, server_round: int) -> None:
        """Begin a round."""
        self._round = server_round
        if hasattr(self._grid, "start_round"):
            self._grid.start_round(server_round)

    def registered_ids(self) -> Iterable[int]:
        """Return every client's id."""
        if hasattr(self._grid, "registered_ids"):
            ids: Iterable[int] = self._grid.registered_ids()
            return ids
        return self._grid.get_node_ids()

    def get_node_ids(self) -> list[int]:
        """Return the clients that were invited in this round, as far as the grid knows them."""
        return sorted(set(self._invited[self._round]) & set(self.registered_ids()))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send as the grid does."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Receive as the grid does."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Ask the clients whose replies were folded, and compare each reply with its row."""
        invited = self._invited[self._round]
        asked: dict[int, Message] = {}
        for message in messages:
            row = invited.get(message.metadata.dst_node_id)
            if row is not None and row.outcome == "ok":
                asked[row.client] = message
                self._compare_role(row, message)
        for row in invited.values():
            if row.outcome == "ok" and row.client not in asked:
                self.problems.append(
                    f"round {row.round}: client {row.client} was folded; in the replay it is not asked."
                )
        for reply in self._grid.send_and_receive(asked.values(), timeout=timeout):
            row = invited[reply.metadata.src_node_id]
            if reply.has_error():
                self.problems.append(
                    f"round {row.round}: client {row.client} was folded, in the replay it fails: "
                    f"{reply.error.reason}"
                )
            elif row.reply_crc32 is not None:
                crc = encode_reply(reply.content, {}).checksum
                if crc != row.reply_crc32:
                    self.problems.append(
                        f"round {row.round}: the reply of client {row.client} has CRC-32 "
                        f"{row.reply_crc32:08x}, its reply in the replay {crc:08x}."
                    )
            yield reply

    def _compare_role(self, row: ClientRoundRow, message: Message) -> None:
        config = message.content[keys.CONFIG]
        role = config.get(keys.LOCAL_UPDATE) if isinstance(config, ConfigRecord) else None
        if role != row.role:
            self.problems.append(
                f"round {row.round}: client {row.client} worked as {row.role!r}, in the replay as {role!r}."
            )


def short(digest: str | None) -> str:
    """Return the start of a digest, for messages."""
    return "none" if digest is None else digest[:12]
