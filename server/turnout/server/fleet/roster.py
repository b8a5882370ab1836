"""Who belongs to the fleet: stable ids by enrolled name, what each client says of itself, who misbehaves."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from turnout.wire.errors import CheckpointError, ReplyRejected
from turnout.wire.text import harmless
from turnout.wire.whole_file import replace_file

_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_MAX_TAGS: Final = 32
_MAX_TEXT: Final = 128
_MAX_ID: Final = 1 << 62
_MAX_EXAMPLES: Final = 1 << 40
_MAX_MEMBERS: Final = 1_000_000


@dataclass(slots=True)
class Member:
    """One logical client. ``attributes`` are what it said in its last hello (device, examples, tags)."""

    id: int
    name: str
    attributes: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    offences: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    settled: bool = False
    """Whether it has said everything that it is chosen by; how many examples it has comes a little later."""


class Roster:
    """Maps enrolled names to client ids; the map is written to ``path`` before an id is used.

    With ``names`` (name to id) only those are admitted. Otherwise a new name gets the partition it asks for
    if no other name holds it, or the next free number.
    """

    def __init__(self, path: Path | None = None, *, names: Mapping[str, int] | None = None) -> None:
        self._path = path
        self._closed = names is not None
        self.members: dict[int, Member] = {}
        self._ids: dict[str, int] = {}
        self._revoked: set[str] = set()
        for name, client in {**self._load(), **(names or {})}.items():
            self._enter(name, client)
        self._next = 0

    def __len__(self) -> int:
        return len(self.members)

    def admit(self, node: str, partitions: list[int | None]) -> list[int]:
        """Return the ids of the logical clients of ``node``; several, or numbered ones, are ``node/number``.

        Raises `ReplyRejected` with a reason when one of them may not take part; then none is entered.
        """
        if not _NAME.fullmatch(node):
            raise ReplyRejected("bad-name", "a name has 1 to 64 letters, digits, '.', '_' or '-'.")
        if node in self._revoked:
            raise ReplyRejected("revoked", f"{node!r} has been revoked.")
        names = [node]
        if len(partitions) > 1:
            names = [f"{node}/{at if number is None else number}" for at, number in enumerate(partitions)]
        if len(set(names)) < len(names):
            raise ReplyRejected("duplicate-client", f"{node!r} names a client twice.")
        fresh: dict[str, int] = {}
        ids = []
        for name, partition in zip(names, partitions, strict=True):
            client = self._ids.get(name)
            if client is None:
                client = fresh[name] = self._assign(name, partition, set(fresh.values()))
            elif partition is not None and client != partition:
                raise ReplyRejected(
                    "wrong-partition", f"{name!r} is client {client} here and asks to be client {partition}."
                )
            ids.append(client)
        if len(self.members) + len(fresh) > _MAX_MEMBERS:
            raise ReplyRejected(
                "too-many-clients", f"{_MAX_MEMBERS} clients are enrolled; no more are taken."
            )
        if fresh:
            self._save(fresh)
            for name, client in fresh.items():
                self._enter(name, client)
        return ids

    def describe(self, client: int, *, device: str, examples: int, tags: Mapping[str, str]) -> None:
        """Keep what a client says of itself, cut to a bounded size."""
        kept = {_short(key): _short(value) for key, value in list(tags.items())[:_MAX_TAGS]}
        member = self.members[client]
        known = member.attributes.get("examples", 0)  # Mostly said a little later.
        member.settled = member.settled or examples > 0
        member.attributes = {
            "device": _short(device),
            "examples": min(examples or known, _MAX_EXAMPLES),
            "tags": kept,
        }

    def settle(self, client: int, examples: float) -> None:
        """Note how many examples a client says it has."""
        member = self.members[client]
        member.settled = True
        member.attributes = {**member.attributes, "examples": int(min(max(0.0, examples), _MAX_EXAMPLES))}

    def revoke(self, node: str) -> list[int]:
        """Refuse ``node`` from now on; return the clients that it speaks for."""
        self._revoked.add(node)
        return [m.id for m in self.members.values() if m.name.partition("/")[0] == node]

    def readmit(self, node: str) -> None:
        """Take back `revoke`."""
        self._revoked.discard(node)

    def pardon(self, client: int) -> None:
        """Forget a client's offences, which ends its quarantine."""
        self.members[client].offences = 0

    def _assign(self, name: str, partition: int | None, taken: set[int]) -> int:
        if self._closed:
            raise ReplyRejected("unknown-client", f"{name!r} is not enrolled here.")
        if partition is not None:
            if partition in self.members or partition in taken or partition >= _MAX_ID:
                holder = self.members[partition].name if partition in self.members else "none"
                raise ReplyRejected("partition-taken", f"client {partition} is {holder!r}, not {name!r}.")
            return partition
        while self._next in self.members or self._next in taken:
            self._next += 1
        return self._next

    def _enter(self, name: str, client: int) -> None:
        self._ids[name] = client
        self.members[client] = Member(client, name)

    def _load(self) -> dict[str, int]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            names = json.loads(self._path.read_text())["clients"]
            return {str(name): int(client) for name, client in names.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"roster {self._path}: not readable ({error!r}); restore or remove it."
            ) from error

    def _save(self, fresh: Mapping[str, int]) -> None:
        if self._path is None:
            return
        text = json.dumps({"clients": {**self._ids, **fresh}}, indent=1)
        replace_file(self._path, text.encode(), mode=0o600)


def _short(text: str) -> str:
    return harmless(text[:_MAX_TEXT])
