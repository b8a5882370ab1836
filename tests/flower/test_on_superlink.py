"""A run on real SuperNodes that get lost, and one that outlives SuperLink, ServerApp and SuperNodes."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from test_same_model import APP, EXPERIMENT

from flower_superlink import SuperLink, federation
from turnout.experiment.flower_app import experiment_of
from turnout.server import RunStore
from turnout.simulation.run import simulate

pytestmark = [pytest.mark.flower, pytest.mark.timeout(900)]

CLIENTS = 4


def test_a_lost_supernode_is_the_one_that_is_missing(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    chosen = "run.rounds=4 fleet.wait=120 fleet.participation=live fleet.min_clients=3 fleet.timeout=60"

    def lose(link: SuperLink) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if (runs / "turnout.sqlite").exists():
                with RunStore(runs) as store:
                    if any(row.client == 2 for run in store.runs() for row in store.client_rows(run.id)):
                        link.stop_node(2)
                        return
            time.sleep(0.1)

    with federation(tmp_path / "flwr", range(CLIENTS)) as link:
        thread = threading.Thread(target=lose, args=(link,))
        thread.start()
        link.run(APP, {"strategy": "fedau", "runs": str(runs), "set": chosen})
        thread.join()
    with RunStore(runs) as store:
        run = store.run("last")
        assert run.status == "finished"
        outcomes = {(row.round, row.client): row.outcome for row in store.client_rows(run.id)}
    assert {client for _, client in outcomes} == set(range(CLIENTS))
    assert {server_round for server_round, _ in outcomes} == {1, 2, 3, 4}
    bad = {client for (_, client), outcome in outcomes.items() if outcome != "ok"}
    assert bad == {2}


def test_a_run_outlives_superlink_and_supernodes(tmp_path: Path) -> None:
    runs, state = tmp_path / "runs", tmp_path / "state"
    for part, rounds in enumerate((2, 4)):
        with federation(tmp_path / f"flwr-{part}", range(CLIENTS), **{"state-dir": str(state)}) as link:
            config = {
                "strategy": "rerce-fed",
                "runs": str(runs),
                "set": f"run.rounds={rounds} fleet.wait=120",
                "resume": "last" if part else "",
            }
            link.run(APP, config)
    with RunStore(runs) as store:
        assert len(store.runs()) == 1
        run = store.run("last")
    chosen = {"strategy": "rerce-fed", "set": f"run.rounds=4 run.directory={tmp_path / 'simulated'}"}
    whole = simulate(experiment_of(chosen, EXPERIMENT), plots=False)
    assert (run.status, run.model_sha256) == ("finished", whole.model_sha256)
