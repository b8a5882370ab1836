"""``turnout data fetch``: what is there is checked, what is not is said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result

from turnout.tasks import source_archives
from turnout.tasks.source_archives import VADER

Turnout = Callable[..., Result]


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no index to fetch from."""
    monkeypatch.setenv("TURNOUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    folder = tmp_path / "cache" / "archives"
    folder.mkdir(parents=True)
    return folder


def test_an_archive_that_is_there_is_checked_and_named(
    turnout: Turnout, archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"as good as an archive"
    known = replace(VADER, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(source_archives.ARCHIVES, VADER.task, known)
    (archives / VADER.file_name).write_bytes(content)
    result = turnout("data", "fetch", "vader-sentiment", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {
        "task": "vader-sentiment",
        "path": str(archives / VADER.file_name),
        "sha256": known.sha256,
    }
    (archives / VADER.file_name).write_bytes(content + b"!")
    result = turnout("data", "fetch", "vader-sentiment")
    assert result.exit_code == 1
    assert f"expected {known.sha256}" in result.stderr.replace("\n", "")


def test_what_cannot_be_fetched_is_an_error(turnout: Turnout, archives: Path) -> None:
    result = turnout("data", "fetch", "vader-sentiment")
    assert result.exit_code == 1
    assert "vaderSentiment 3.3.2 could not be fetched" in result.stderr
    assert list(archives.iterdir()) == []
    result = turnout("data", "fetch", "vader")
    assert result.exit_code == 2
    assert "Did you mean 'vader-sentiment'" in result.stderr
