"""Apple's pfl in the simulator benchmark: its FederatedAveraging, SimulatedBackend and PyTorchModel.

pfl's own way to use more cores is several processes that sum over torch.distributed; the other is PyTorch's
threads in one process. Both are measured.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import socket
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fleet_parties import SPAWN, Turns
from simulators_turns import Gate
from simulators_work import Federation, Workload, flat


def pfl(turns: Turns, work: Workload, processes: int, threads: int) -> None:
    """``processes`` processes with so many threads each."""
    addresses = ",".join(f"localhost:{port}" for port in _free_ports(processes)) if processes > 1 else ""
    others = [SPAWN.Process(target=_process, args=(None, work, i, addresses, threads), daemon=True)
              for i in range(1, processes)]  # fmt: skip
    for other in others:
        other.start()
    try:
        _process(Gate(turns), work, 0, addresses, threads)
    finally:
        for other in others:
            other.kill()


class Learner(nn.Module):
    """The workload's module, with the two methods that pfl asks of one."""

    def __init__(self, task: Federation) -> None:
        super().__init__()
        self.body = task.seeded_model(task.seed)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.body(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        from pfl.metrics import Weighted

        return {"loss": Weighted(float(self.loss(x, y)) * len(y), len(y))}


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _process(gate: Gate | None, work: Workload, rank: int, addresses: str, threads: int) -> None:
    # pfl joins its process group on import, and only in what it takes for the main process.
    multiprocessing.current_process().name = "MainProcess"
    if addresses:
        os.environ |= {"PFL_WORKER_ADDRESSES": addresses, "PFL_WORKER_RANK": str(rank)}
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)  # pfl calls what PyTorch renamed.
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    task = Federation(work)

    class Shuffled(Dataset):  # type: ignore[misc]
        """A user's examples, in the order that every other system has them in."""

        def __init__(self, client: int, server_round: int) -> None:
            data = task.client_data(client)
            super().__init__([data.x, data.y], user_id=client)
            self.orders = task.orders(client, server_round)

        def iter(self, batch_size: int | None) -> Iterator[list[Tensor]]:
            x, y = self.raw_data
            if batch_size is None or batch_size >= len(y):  # pfl evaluates in its first iteration.
                yield [x, y]
                return
            for rows in next(self.orders).split(batch_size):
                yield [x.index_select(0, rows), y.index_select(0, rows)]

    # pfl asks for the users one by one, so the round is told with each.
    users = ((client, number) for number in itertools.count(1) for client in work.cohort_of(number))
    users_data = FederatedDataset(lambda user: Shuffled(*user), lambda: next(users))

    class Turn(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(self, _metrics: Any, model: Any, **_: Any) -> tuple[bool, Any]:
            going = gate is None or gate.passed(lambda: flat(model.pytorch_model).numpy())
            return not going, Metrics()

    learner = Learner(task)
    model = PyTorchModel(learner, torch.optim.SGD, torch.optim.SGD(learner.parameters(), lr=1.0))
    if gate is not None and not gate.ready():
        return
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=10**9,
            evaluation_frequency=10**9,
            train_cohort_size=work.cohort,
            val_cohort_size=None,
        ),
        SimulatedBackend(training_data=users_data, val_data=users_data),
        model,
        NNTrainHyperParams(
            local_num_epochs=work.epochs, local_learning_rate=work.lr, local_batch_size=work.batch_size
        ),
        callbacks=[Turn()],
        send_metrics_to_platform=False,
    )
