"""A server process of the crash tests: ``DIRECTORY PORT ROUNDS CLIENTS``; resumes by itself."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord

from turnout.server.fleet import CommitCallback, FleetGrid, FleetOptions, FleetServer
from turnout.strategies import Callback, RoundReport, Scaffold
from turnout.wire import as_array, save_checkpoint


class Keeper(Callback):
    """Writes the round's checkpoint before anyone is told that it is done."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_round_end(self, report: RoundReport) -> None:
        save_checkpoint(self._path, report.checkpoint())
        print(json.dumps({"committed": report.server_round}), flush=True)


def main() -> None:
    logging.basicConfig(level="ERROR")
    directory, port, rounds, clients = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    checkpoint = directory / "checkpoint.safetensors"
    arrays = ArrayRecord()
    arrays["w"] = as_array(np.zeros(int(sys.argv[5]) if len(sys.argv) > 5 else 20_000, np.float32))
    strategy = Scaffold(num_clients=clients)
    options = FleetOptions(reconnect=60)
    with FleetServer(
        f"127.0.0.1:{port}", directory=directory, num_clients=clients, options=options
    ) as server:
        print(json.dumps({"listening": server.port}), flush=True)
        grid = FleetGrid(server, min_clients=clients, wait=60)
        strategy.start(
            grid,
            arrays,
            num_rounds=rounds,
            timeout=60,
            resume_from=checkpoint if checkpoint.exists() else None,
            callbacks=[Keeper(checkpoint), CommitCallback(grid)],
        )
        bad = [r.reason for r in strategy.reports if r.outcome != "ok"]
        print(json.dumps({"model": hashlib.sha256(strategy.x.tobytes()).hexdigest(), "bad": bad,
                          "replies": dict(server.counters.replies)}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
