"""One-use secrets that let a node fetch its first certificate; only their hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from turnout.server.fleet.private_files import locked, read_document, write_document
from turnout.wire.errors import ConfigError, TurnoutError

TOKENS_FILE: Final = "tokens.json"
# Scanners of repositories and logs find a secret by its prefix.
_PREFIX: Final = "turnout-enrol-"
_LONGEST_TTL: Final = 30 * 86400.0
# So long an expired token is still answered as such and not as unknown.
_KEPT_SECONDS: Final = 7 * 86400.0


class EnrolmentRefused(TurnoutError):  # noqa: N818 - an answer, counted by its reason
    """A node gets no certificate. ``reason`` is a short kebab-case word."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(slots=True)
class _Token:
    """``expires`` is in seconds of the wall clock; ``key`` is the fingerprint of the key it was used with."""

    hash: str
    name: str
    expires: float
    key: str = ""


class TokenBook:
    """The tokens of ``directory/tokens.json``; any number of processes may issue and redeem at once."""

    def __init__(self, directory: str | Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = Path(directory) / TOKENS_FILE
        self._clock = clock

    def issue(self, name: str, ttl: float) -> str:
        """Return a new token for ``name``, valid for ``ttl`` seconds; it is told this once and not kept."""
        if not 0 < ttl <= _LONGEST_TTL:
            raise ConfigError(
                f"ttl must be above 0 and at most {_LONGEST_TTL:g} seconds (30 days), got {ttl:g}."
            )
        token = _PREFIX + secrets.token_urlsafe(32)
        with locked(self._path):
            now = self._clock()
            kept = [known for known in self._read() if known.expires > now - _KEPT_SECONDS]
            self._write([*kept, _Token(_hash(token), name, now + ttl)])
        return token

    def redeem(self, name: str, token: str, key: str) -> None:
        """Bind ``token`` to the key with fingerprint ``key``; on disk before this returns.

        The same key may come again while the token lives, since the answer may have been lost. Raises
        `EnrolmentRefused` for any other.
        """
        with locked(self._path):
            tokens = self._read()
            known = _find(tokens, _hash(token))
            if known is None:
                raise EnrolmentRefused("unknown-token", "the token is unknown here; ask for a new one.")
            if known.name != name:
                raise EnrolmentRefused("wrong-name", f"the token was not issued for {name!r}.")
            if known.expires <= self._clock():
                raise EnrolmentRefused("expired-token", "the token has expired; ask for a new one.")
            if known.key:
                if not hmac.compare_digest(known.key, key):
                    raise EnrolmentRefused(
                        "used-token",
                        "the token has been used with another key; if not by you, have the name revoked.",
                    )
                return
            known.key = key
            self._write(tokens)

    def void(self, name: str) -> int:
        """Forget every token of ``name``; return how many there were."""
        with locked(self._path):
            tokens = self._read()
            kept = [token for token in tokens if token.name != name]
            if len(kept) < len(tokens):
                self._write(kept)
            return len(tokens) - len(kept)

    def _read(self) -> list[_Token]:
        rows: Any = read_document(self._path).get("tokens", [])
        try:
            return [_Token(str(r["hash"]), str(r["name"]), float(r["expires"]), str(r["key"])) for r in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{self._path}: not readable ({error!r}); remove it and issue new tokens."
            ) from error

    def _write(self, tokens: list[_Token]) -> None:
        write_document(self._path, {"tokens": [asdict(token) for token in tokens]})


def _find(tokens: list[_Token], digest: str) -> _Token | None:
    """Compare with every hash, each in constant time: how long it takes tells nothing."""
    found = None
    for token in tokens:
        if hmac.compare_digest(token.hash, digest):
            found = token
    return found


def _hash(token: str) -> str:
    # A token is 256 random bits, so a plain hash cannot be searched.
    return hashlib.sha256(token.encode()).hexdigest()
