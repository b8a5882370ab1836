"""``TURNOUT_LOG_FORMAT=json``: every line of stderr is one object that says what it is about."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from turnout.cli.json_log import JsonFormatter


def run(place: Path, *arguments: str, log_format: str = "json") -> tuple[int, str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-m", "turnout.cli", *arguments],
        cwd=place,
        env={**os.environ, "TURNOUT_LOG_FORMAT": log_format, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


def test_a_run_is_logged_round_by_round(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(
        '[run]\nrounds = 4\n[task]\nname = "digits"\nmodel = "softmax"\nnum_clients = 3\n'
    )
    code, out, lines = run(tmp_path, "simulate", "small.toml", "--no-plots", "--json")
    assert code == 0, lines
    documents: list[dict[str, Any]] = [json.loads(line) for line in lines]
    run_id = json.loads(out)["run_id"]
    rounds = [d for d in documents if f"round {d.get('round')}/4" in d["message"]]
    assert [d["round"] for d in rounds] == [1, 2, 3, 4]  # Not two a second, as on a terminal.
    assert all(d["run"] == run_id and d["level"] == "info" for d in rounds)
    assert all(d["time"].endswith("+00:00") for d in documents)
    assert {d["logger"].partition(".")[0] for d in documents} == {"turnout"}


def test_errors_are_lines_too(tmp_path: Path) -> None:
    code, _, lines = run(tmp_path, "simulate", "absent.toml")
    assert code == 2
    said = [json.loads(line) for line in lines]
    assert [line["level"] for line in said] == ["error"]
    assert "absent.toml" in said[0]["message"]


def test_a_format_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    code, _, lines = run(tmp_path, "methods", log_format="xml")
    assert code == 2
    assert "set it to json or text" in " ".join(lines)


def test_a_record_says_more_than_the_command_knows() -> None:
    context: dict[str, Any] = {"run": "abc", "round": 3}
    formatter = JsonFormatter(context)
    record = logging.LogRecord("turnout.x", logging.WARNING, "f.py", 1, "two\nlines of %s", ("é",), None)
    record.client, record.round = 7, 4
    line = formatter.format(record)
    assert "\n" not in line
    document = json.loads(line)
    assert (document["run"], document["round"], document["client"]) == ("abc", 4, 7)
    assert document["message"] == "two\nlines of é"
    try:
        raise ValueError("wrong")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert "ValueError: wrong" in json.loads(formatter.format(record))["traceback"]


@pytest.mark.parametrize("log_format", ["", "text"])
def test_people_get_plain_lines(log_format: str, tmp_path: Path) -> None:
    code, _, lines = run(tmp_path, "simulate", "absent.toml", log_format=log_format)
    assert code == 2
    assert lines[0].startswith("error: ")
