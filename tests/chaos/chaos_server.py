"""A server process of the chaos tests: a run on the real commit path, told what to do by one JSON document.

``python chaos_server.py '{"store": DIRECTORY, "port": PORT, ...}'`` serves one run and ends. Without a
document it imports everything, reads one document per line from standard input and forks a process for each:
the same work without the second of imports, for tests that start hundreds of servers.

Every line of output is a JSON object; times are `time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from turnout.server.fleet import CommitCallback, FleetGrid, FleetOptions, FleetServer
from turnout.server.fleet.roster import Roster
from turnout.server.recorder import RunDescription, RunRecorder
from turnout.server.store import RunStore
from turnout.strategies import Callback, FedVARP, RoundReport, Scaffold
from turnout.wire import as_array

NEVER = 1 << 60


def say(**values: Any) -> None:
    # One write: lines of a killed process are whole or missing.
    os.write(1, (json.dumps({"pid": os.getpid(), "at": time.monotonic(), **values}) + "\n").encode())


class Faults:
    """The preloaded shim's arm; without the shim nothing happens."""

    def __init__(self, fault: dict[str, int] | None) -> None:
        self._shim = ctypes.CDLL(None) if hasattr(ctypes.CDLL(None), "fault_arm") else None
        if fault is not None and self._shim is None:
            raise RuntimeError("a fault was asked for, but the shim is not preloaded.")
        if fault is not None and self._shim is not None:
            numbers = (fault["kinds"], fault["at"], fault["action"], fault.get("errno", 0))
            self._shim.fault_arm(*(ctypes.c_long(number) for number in numbers))

    def steps(self) -> int:
        return int(self._shim.fault_steps()) if self._shim is not None else 0


class Teller(Callback):
    """Says which rounds are done; stops there when the test wants to look at one commit."""

    def __init__(self, faults: Faults, *, hold_after: int) -> None:
        self._faults, self._hold_after, self._done = faults, hold_after, 0

    def on_round_end(self, report: RoundReport) -> None:
        self._done += 1
        say(committed=report.server_round, steps=self._faults.steps())
        if self._done == self._hold_after:
            time.sleep(600)


def open_run(store: RunStore, config: dict[str, Any]) -> tuple[RunRecorder, Any]:
    """Go on with the store's only run, or make it; a new one in any case with ``fresh``."""
    runs = store.runs(limit=1)
    rounds = int(config["rounds"])
    if runs and not config.get("fresh"):
        return RunRecorder.resume(store, runs[0], num_rounds=rounds, config=runs[0].config)
    description = RunDescription(
        name="chaos",
        strategy="scaffold",
        task="noise",
        seed=0,
        num_rounds=rounds,
        num_clients=int(config["clients"]),
        config={"clients": int(config["clients"])},
    )
    return RunRecorder.create(store, config["store"], description), None


def tell_first_offer(server: FleetServer) -> None:
    while server.counters.offers == 0:
        time.sleep(0.002)
    say(offered=True)


def serve(config: dict[str, Any], faults: Faults) -> None:
    clients = int(config["clients"])
    options = FleetOptions(**{"reconnect": 60, **config.get("options", {})})
    arrays = ArrayRecord()
    arrays["w"] = as_array(np.zeros(int(config["size"]), np.float32))
    with RunStore(config["store"]) as store:
        recorder, checkpoint = open_run(store, config)
        say(run=recorder.run.id, after=recorder.last_round)
        server = FleetServer(
            f"{config.get('host', '127.0.0.1')}:{config['port']}",
            run=recorder.run.id,
            directory=recorder.directory.path,
            num_clients=clients,
            options=options,
        )
        with recorder:
            server.start()
            say(listening=server.port)
            threading.Thread(target=tell_first_offer, args=(server,), daemon=True).start()
            grid = FleetGrid(server, min_clients=clients, wait=60)
            strategy = Scaffold(num_clients=clients)
            try:
                strategy.start(
                    grid,
                    arrays,
                    num_rounds=int(config["rounds"]),
                    timeout=float(config.get("timeout", 60)),
                    resume_from=checkpoint,
                    callbacks=[
                        recorder,
                        CommitCallback(grid),
                        Teller(faults, hold_after=config.get("hold_after", 0)),
                    ],
                )
            except BaseException:
                server.stop(reconnect=True)
                raise
            server.stop()
        replies, reasons = dict(server.counters.replies), dict(server.counters.reasons)
        counts = {"offers": server.counters.offers, "replies": replies, "reasons": reasons}
        say(finished=recorder.model_sha256, steps=faults.steps(), **counts)


def create(config: dict[str, Any], faults: Faults) -> None:
    """Open the store, make the run or open it again, and no more."""
    with RunStore(config["store"]) as store:
        recorder, _ = open_run(store, config)
        recorder.directory.release()
    say(created=recorder.run.id, steps=faults.steps())


def local(config: dict[str, Any], faults: Faults) -> None:
    """Run rounds on clients in this process: the commit path alone; with ``memory``, that of rows too."""
    from chaos_harness import few_of_many, undisturbed, zeros

    clients = int(config["clients"])
    with RunStore(config["store"]) as store:
        recorder, checkpoint = open_run(store, config)
        with recorder:
            memory = config.get("memory")
            strategy = FedVARP(memory=memory) if memory else Scaffold(num_clients=clients)
            strategy.start(
                few_of_many(clients) if memory else undisturbed(clients),
                zeros(int(config["size"])),
                num_rounds=int(config["rounds"]),
                resume_from=checkpoint,
                callbacks=[recorder],
            )
    say(finished=recorder.model_sha256, steps=faults.steps())


def enrol(config: dict[str, Any], faults: Faults) -> None:
    """Admit one more client to the roster in the store's directory."""
    roster = Roster(Path(config["store"]) / "roster.json")
    ids = roster.admit(config["name"], [None])
    say(enrolled=ids, steps=faults.steps())


def work(config: dict[str, Any]) -> int:
    try:
        faults = Faults(config.get("fault"))
        tasks = {"serve": serve, "create": create, "enrol": enrol, "local": local}
        tasks[config.get("task", "serve")](config, faults)
    except KeyboardInterrupt:
        say(interrupted=True)
        return 130
    except BaseException as error:
        shown = [f"{type(e).__name__}: {e}" for e in (error, error.__context__) if e is not None]
        say(failed=shown[0], context=shown[1:])
        return 1
    return 0


def fork_on_demand() -> None:
    import alembic.command
    import alembic.config
    import alembic.script  # noqa: F401 - imported here once, and not in every process that makes a store.

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            say(started=True)
            os._exit(work(json.loads(line)))
        _, status = os.waitpid(child, 0)
        say(exited=os.waitstatus_to_exitcode(status), child=child)


if __name__ == "__main__":
    logging.basicConfig(level=os.environ.get("LEVEL", "ERROR"))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Shells start background jobs without it.
    if len(sys.argv) > 1:
        say(started=True)
        sys.exit(work(json.loads(sys.argv[1])))
    fork_on_demand()
