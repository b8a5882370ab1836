"""BlazeFL in the simulator benchmark: its own FedAvg, with its serial, thread-pool and process-pool trainers.

The data set hands out batches cut from gathered tensors, where BlazeFL's examples build a DataLoader, and a
client's model is a copy of one that exists, so that no time goes where the library does not need it.
"""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fleet_parties import Turns
from simulators_turns import Gate, cores
from simulators_work import Federation, Workload, flat


class Batches:
    """What BlazeFL takes for a DataLoader; each pass over it is an epoch."""

    def __init__(self, task: Federation, client: int, server_round: int) -> None:
        self.dataset = None
        self._data, self._size = task.client_data(client), task.work.batch_size
        self._orders = task.orders(client, server_round)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in next(self._orders).split(self._size):
            yield self._data.x.index_select(0, rows), self._data.y.index_select(0, rows)


class Clients:
    """A partitioned data set and model selector in one; pickled, it is the number of the round.

    The process pool is forked anew in each round, so its processes have the task already.
    """

    task: Federation
    template: nn.Module

    def __init__(self) -> None:
        self.server_round = 1

    def get_dataloader(self, type_: Any, cid: int, batch_size: int, generator: Any) -> Batches:
        return Batches(Clients.task, cid, self.server_round)

    def set_dataset(self, type_: Any, cid: int, dataset: Any) -> None:
        """Keep nothing."""

    def select_model(self, model_name: str) -> nn.Module:
        return copy.deepcopy(Clients.template)


def blazefl(turns: Turns, work: Workload, trainer: str, threads: int) -> None:
    """``trainer``: "serial", "threads" or "processes", with so many of PyTorch's threads in each client."""
    multiprocessing.set_start_method("fork", force=True)  # Linux's own, which BlazeFL's users have.
    torch.set_num_threads(threads)
    from blazefl.contrib import FedAvgBaseServerHandler
    from blazefl.reproducibility import setup_reproducibility

    setup_reproducibility(work.seed)  # As its examples do; forked processes then have what it imports.
    Clients.task, gate = Federation(work), Gate(turns)
    Clients.template = Clients.task.seeded_model(work.seed)
    clients = Clients()
    with tempfile.TemporaryDirectory(prefix="simulators-") as folder:
        server = FedAvgBaseServerHandler(
            model_selector=clients,
            model_name="",
            dataset=clients,
            global_round=10**9,
            num_clients=work.clients,
            sample_ratio=work.cohort / work.clients,
            device="cpu",
            batch_size=work.batch_size,
            seed=work.seed,
        )
        client_trainer = _trainer(trainer, clients, work, Path(folder))
        going = gate.ready()
        while going:
            clients.server_round = server.round + 1
            client_trainer.local_process(server.downlink_package(), work.cohort_of(server.round + 1))
            for package in client_trainer.uplink_package():
                server.load(package)
            going = gate.passed(lambda: flat(server.model).numpy())


def _trainer(name: str, clients: Clients, work: Workload, folder: Path) -> Any:
    from blazefl.contrib import (
        FedAvgBaseClientTrainer,
        FedAvgProcessPoolClientTrainer,
        FedAvgThreadPoolClientTrainer,
    )
    from blazefl.core import IPCMode

    common = {
        "model_selector": clients,
        "model_name": "",
        "dataset": clients,
        "device": "cpu",
        "num_clients": work.clients,
        "epochs": work.epochs,
        "batch_size": work.batch_size,
        "lr": work.lr,
        "seed": work.seed,
    }
    if name == "serial":
        return FedAvgBaseClientTrainer(**common)
    if name == "threads":
        return FedAvgThreadPoolClientTrainer(**common, num_parallels=cores())
    return FedAvgProcessPoolClientTrainer(
        **common,
        state_dir=folder / "state",
        share_dir=folder / "share",
        num_parallels=cores(),
        ipc_mode=IPCMode.SHARED_MEMORY,
    )
