from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import turnout.reproduce
from turnout.reproduce import Claim, StudyReport, Table
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.report import number
from turnout.wire import TurnoutError, find, methods

# Studies are files named by their slug; importing the package must register every one of them.
SLUGS = sorted(
    path.stem.replace("_", "-")
    for path in Path(turnout.reproduce.__file__ or "").parent.glob("*.py")
    if '"study"' in path.read_text(encoding="utf-8")
)


def test_studies_are_registered_with_their_papers() -> None:
    entries = {entry.slug: entry for entry in methods("study")}
    assert len(SLUGS) >= 4
    assert sorted(entries) == SLUGS
    for entry in entries.values():
        assert callable(entry.target)
        assert entry.paper
        assert entry.summary
        assert find("study", entry.slug) is entry


def test_importing_the_studies_draws_nothing() -> None:
    code = "import sys, turnout.reproduce; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_json_has_the_promised_shape_and_only_plain_values() -> None:
    claims = (
        Claim("a", 0.123456789, 1, True),
        Claim("b", math.nan, math.inf, False),
        Claim("c", "0.5, 0.7", "reference: 0.5", True),
    )
    report = StudyReport("some-slug", 1.23456, claims, ())
    plain = report.to_json()
    assert set(plain) == {"slug", "seconds", "claims"}
    assert [set(claim) for claim in plain["claims"]] == [{"claim", "measured", "baseline", "holds"}] * 3
    assert plain["claims"][0]["measured"] == pytest.approx(0.123457)
    assert plain["claims"][1]["measured"] == "not finite"
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_a_table_formats_numbers_and_refuses_ragged_rows() -> None:
    table = Table.of("title", ("name", "value"), [["a", 0.00123456], ["b", math.nan], ["c", 12]])
    assert table.rows == (("a", "0.00123"), ("b", "-"), ("c", "12"))
    with pytest.raises(ValueError, match="1 cells, not 2"):
        Table.of("title", ("name", "value"), [["a"]])


@pytest.mark.parametrize(
    ("value", "text"), [(math.inf, "diverges"), (1e23, "diverges"), (-0.5, "-0.5"), (3.0, "3")]
)
def test_numbers_as_text(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_come_back_in_order_and_are_announced(workers: int) -> None:
    seen: list[tuple[str, int, int]] = []
    results = run_jobs(
        math.factorial, [5, 3, 1], what="counting", workers=workers, progress=lambda *told: seen.append(told)
    )
    assert results == [120, 6, 1]
    assert seen == [("counting", done, 3) for done in (1, 2, 3)]


def test_a_failing_job_is_not_hidden() -> None:
    with pytest.raises(ValueError, match="factorial"):
        run_jobs(math.factorial, [1, -1], what="counting", workers=2)


def test_a_program_from_standard_input_can_run_jobs() -> None:
    code = """
import math
from turnout.reproduce.jobs import run_jobs
print(run_jobs(math.factorial, [4, 3], what="counting"))
"""
    done = subprocess.run([sys.executable], input=code, text=True, capture_output=True, check=False)
    assert done.stdout.strip() == "[24, 6]", done.stderr


def test_a_killed_process_is_explained() -> None:
    with pytest.raises(TurnoutError, match="killed from outside"):
        run_jobs(os._exit, [1, 1], what="leaving", workers=2)


def test_the_studies_do_not_write_anything_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turnout.reproduce import fedamd

    monkeypatch.chdir(tmp_path)
    fedamd.run(sizes=fedamd.Sizes(rounds=3, seeds=1, tail=2), workers=1)
    assert not list(tmp_path.iterdir())
