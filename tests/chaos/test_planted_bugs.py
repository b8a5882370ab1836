"""Does the suite notice? Each planted bug, in a copy of the source, must turn its test red."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = ("proto", "strategies", "client", "server")


@dataclass(frozen=True)
class Bug:
    """``old`` occurs once in ``file`` and becomes ``new``; ``test`` is what must then fail.

    ``also`` are further changes, for what is checked at more than one place.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    also: tuple[tuple[str, str, str], ...] = ()

    def edits(self) -> tuple[tuple[str, str, str], ...]:
        return ((self.file, self.old, self.new), *self.also)


BUGS = (
    Bug(
        "a round is committed before its checkpoint is synced",
        "proto/turnout/wire/checkpoint.py",
        "            os.fsync(file.fileno())\n        os.replace(temporary, path)\n",
        "        os.replace(temporary, path)\n",
        "tests/chaos/test_commit_order.py::test_a_round_is_committed_after_its_checkpoint_is_synced",
    ),
    Bug(
        "a round is committed before its checkpoint is written",
        "server/turnout/server/recorder.py",
        "save_checkpoint(path, tree)",
        "import atexit; atexit.register(save_checkpoint, path, tree)",
        "tests/chaos/test_commit_order.py::test_a_round_is_committed_after_its_checkpoint_is_synced",
    ),
    Bug(
        "the store does not wait for the disk",
        "server/turnout/server/database.py",
        "'NORMAL' if _RELAXED_OPTION in options else 'FULL'",
        "'OFF'",
        "tests/chaos/test_commit_order.py::test_a_round_is_committed_after_its_checkpoint_is_synced",
    ),
    Bug(
        "replies are acknowledged before the round is durable",
        "server/turnout/server/fleet/grid.py",
        'tell = self._strategy is None or outcome != "accepted"',
        "tell = True",
        "tests/chaos/test_commit_order.py::test_no_client_is_told_before_the_round_is_durable",
    ),
    Bug(
        "a reply that comes twice is taken twice",
        "server/turnout/server/fleet/hub.py",
        "elif task.stage is not Stage.OFFERED:",
        "elif False:",
        "tests/fleet/test_hostile_replies.py::test_replays_duplicates_and_foreign_replies_are_folded_once",
    ),
    Bug(
        "replies are folded without a look at their numbers",
        "server/turnout/server/fleet/staging.py",
        "if low < high and not _finite(buffer[low:high], kind):",
        "if False:",
        "tests/fleet/test_hostile_replies.py::test_poison_is_refused_before_folding",
        also=(
            (
                "strategies/turnout/strategies/measure.py",
                "            check_range(name, high, low)\n",
                "            pass\n",
            ),
        ),
    ),
    Bug(
        "a client's word is taken for who it is",
        "server/turnout/server/fleet/servicer.py",
        "if hello.name not in names:",
        "if False:",
        "tests/fleet/test_fleet_tls.py::test_the_name_is_bound_to_the_certificate",
    ),
    Bug(
        "a checkpoint's checksum is not compared",
        "proto/turnout/wire/checkpoint.py",
        "if _digest(closing, [body]).encode() != claimed:",
        "if False:",
        "tests/chaos/test_disk.py::test_every_damaged_byte_is_found",
    ),
    Bug(
        "a row that a checkpoint refers to is written over",
        "proto/turnout/wire/row_file.py",
        "in_place = old != _NOWHERE and key in self._fresh",
        "in_place = old != _NOWHERE",
        "tests/wire/test_row_file.py::TestCheckpoints::test_both_kept_checkpoints_stay_as_they_were",
    ),
    Bug(
        "another run's checkpoint is as good",
        "server/turnout/server/recorder.py",
        'if (tree.get("run"), tree.get("round")) != (run.id, round_number):',
        "if False:",
        "tests/chaos/test_commit_order.py::test_another_runs_checkpoint_is_refused",
    ),
    Bug(
        "a client works on with the state of a round that was undone",
        "client/turnout/client/node/journal.py",
        "if 0 < r <= base_round",
        "if 0 < r",
        "tests/chaos/test_commit_order.py::test_a_round_done_twice_changes_the_state_once",
    ),
    Bug(
        "a reply leaves before the client's state is kept",
        "client/turnout/client/node/journal.py",
        "            save_checkpoint(self._path(server_round), tree)\n",
        "            pass\n",
        "tests/chaos/test_commit_order.py::test_a_round_done_twice_changes_the_state_once",
    ),
    Bug(
        "two servers may work on one run",
        "server/turnout/server/run_directory.py",
        "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "tests/server/test_run_directory.py::test_a_directory_belongs_to_one_process",
    ),
    Bug(
        "late replies are taken",
        "server/turnout/server/fleet/hub.py",
        "elif ready.attempt != task.attempt:",
        "elif False:",
        "tests/chaos/test_commit_order.py::test_a_reply_of_an_old_attempt_is_late",
    ),
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the source roots, bytecode included: only what is changed is compiled again."""
    copy = tmp_path_factory.mktemp("planted")
    for root in ROOTS:
        shutil.copytree(REPOSITORY / root / "turnout", copy / root / "turnout")
    return copy


def test_without_a_bug_all_these_tests_are_green(planted: Path) -> None:
    done = _run_tests(list(dict.fromkeys(bug.test for bug in BUGS)), planted)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-500:]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_a_planted_bug_turns_its_test_red(bug: Bug, planted: Path) -> None:
    sources = {file: (REPOSITORY / file).read_text(encoding="utf-8") for file, _, _ in bug.edits()}
    try:
        for file, old, new in bug.edits():
            assert sources[file].count(old) == 1, f"{file} has changed: update the table of planted bugs"
            (planted / file).write_text(sources[file].replace(old, new), encoding="utf-8")
        done = _run_tests([bug.test], planted)
    finally:
        for file, source in sources.items():
            (planted / file).write_text(source, encoding="utf-8")
    report = done.stdout[-2000:] + done.stderr[-500:]
    # 1 is pytest's "tests failed"; anything else is a test that did not run.
    assert done.returncode == 1, f"not noticed ({done.returncode}):\n{report}"
    assert " error" not in done.stdout.splitlines()[-1], report
    # A test that only runs out of time says nothing of what is wrong.
    assert "+ Timeout +" not in done.stdout + done.stderr, f"ended by the time limit:\n{report}"


def _run_tests(tests: list[str], planted: Path) -> subprocess.CompletedProcess[str]:
    roots = os.pathsep.join(str(planted / root) for root in ROOTS)
    # Without the plugins that these tests do not use: most of a pytest's start.
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
    return subprocess.run(
        [*command, "--timeout=20", *tests],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": roots, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
