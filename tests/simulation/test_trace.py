from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from turnout.simulation import Trace
from turnout.wire import ConfigError

ROUNDS = np.array([[1, 0, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=bool)


def masks(trace: Trace, rounds: int) -> np.ndarray:
    return np.stack([trace.mask(r) for r in range(1, rounds + 1)])


@pytest.mark.parametrize("shape", [(4, 3), (1, 1), (2, 1), (3, 2), (50, 40)])
def test_round_trip_through_a_file(tmp_path: Path, shape: tuple[int, int]) -> None:
    rounds = np.random.default_rng(0).random(shape) < 0.5
    path = tmp_path / "trace.csv"
    Trace(rounds).save(path)
    back = Trace(path)
    assert np.array_equal(masks(back, shape[0]), rounds)
    assert (back.num_rounds, back.num_clients) == shape
    assert np.array_equal(back.probabilities, rounds.mean(axis=0))


@pytest.mark.parametrize(
    "text",
    [
        "1,0,1\n0,0,1\n0,1,0\n0,0,0\n",
        "0,1,2\n1,0,1\n0,0,1\n0,1,0\n0,0,0",
        "client-2,client-0,client-1\n1,1,0\n1,0,0\n0,0,1\n0,0,0\n\n",
        "\ufeff 1, 0, 1\r\n0,0,1\r\n0,1 ,0\r\n0,0,0\r\n",
    ],
)
def test_accepted_forms(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8", newline="")
    assert np.array_equal(masks(Trace(str(path)), 4), ROUNDS)


def test_starts_again_or_raises_at_the_end() -> None:
    assert np.array_equal(masks(Trace(ROUNDS), 10), np.concatenate([ROUNDS, ROUNDS, ROUNDS])[:10])
    once = Trace(ROUNDS, cycle=False)
    assert np.array_equal(masks(once, 4), ROUNDS)
    with pytest.raises(ConfigError, match=r"has 4 rounds and round 5 was asked for; pass cycle=True"):
        once.mask(5)


def test_array_is_copied() -> None:
    mine = ROUNDS.copy()
    trace = Trace(mine)
    mine[:] = False
    assert trace.mask(1)[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "file is empty"),
        ("\n\n", "file is empty"),
        ("client-0,client-1\n", "a header but no round"),
        ("1,0,1\n0,2,1\n", r"line 2, column 2: '2' is neither 0 nor 1; write 1 for took part"),
        ("1,0,1\n0,,1\n", r"line 2, column 2: '' is neither"),
        ("1,0,1\n0,1.0,1\n", r"line 2, column 2: '1\.0'"),
        ("1,0,1\n0,1\n", "line 2: 2 values, but line 1 has 3"),
        ("1,0,1\n\n0,1,1\n", r"line 2, column 1: ''"),
        (
            "1,0,yes\n",
            r"line 1, column 3: 'yes' is neither 0 or 1 nor, in a header, one of client-0 to client-2",
        ),
        ("client-0,client-3,client-1\n1,0,1\n", r"line 1, column 2: 'client-3'"),
        ("client-0,client-1,client-1\n1,0,1\n", r"line 1, column 3: 'client-1'.*for the first time"),
        ("1;0;1\n", r"line 1, column 1: '1;0;1'"),
    ],
)
def test_bad_files_name_file_line_value_and_fix(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "who-came.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        Trace(path)
    assert str(path) in str(error.value)


def test_missing_file_and_bad_arrays(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.csv: cannot be read \(No such file"):
        Trace(tmp_path / "nowhere.csv")
    with pytest.raises(ConfigError, match=r"round 2, client 1 is 3, neither 0 nor 1"):
        Trace([[0, 1], [0, 3]])
    with pytest.raises(ConfigError, match=r"round 1, client 0 is nan"):
        Trace([[float("nan"), 1]])
    with pytest.raises(ConfigError, match=r"shape \(rounds, num_clients\), got \(3,\)"):
        Trace([0, 1, 1])
