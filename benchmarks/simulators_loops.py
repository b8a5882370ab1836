"""Loops written by hand for one model: what a simulator can be compared with, and the limit of this machine.

`textbook` is what a tutorial shows. `tight` is one process per core with one thread each: flat parameters,
functional forward passes, no data loader, no optimizer object, one weighted sum of models per process and
round through shared memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everyone calls it
from torch.utils.data import DataLoader, TensorDataset

from fleet_parties import SPAWN, Turns, children
from simulators_turns import Gate, cores
from simulators_work import CLASSES, Federation, Workload, flat


def textbook(turns: Turns, work: Workload, threads: int) -> None:
    """One process: a DataLoader and an optimizer per client, state_dicts copied, loaded and averaged."""
    torch.set_num_threads(threads)
    task, gate = Federation(work), Gate(turns)
    model = task.seeded_model(task.seed)
    server_round, going = 0, gate.ready()
    while going:
        server_round += 1
        start = copy.deepcopy(model.state_dict())
        mean = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        cohort = work.cohort_of(server_round)
        for client in cohort:
            model.load_state_dict(start)
            _train(model, task, client, server_round)
            for name, tensor in copy.deepcopy(model.state_dict()).items():
                mean[name] += tensor / len(cohort)
        model.load_state_dict(mean)
        going = gate.passed(lambda: flat(model).numpy())


def _train(model: nn.Module, task: Federation, client: int, server_round: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=task.work.lr)
    data = task.client_data(client)
    for order in task.orders(client, server_round):
        batches = [rows.tolist() for rows in order.split(task.work.batch_size)]
        for x, y in DataLoader(TensorDataset(data.x, data.y), batch_sampler=batches):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()


Step = Callable[[Tensor, Tensor], None]


def tight(turns: Turns, work: Workload, variant: str) -> None:
    """``variant``: "autograd", "channels-last" (the same in that layout), or "by-hand" (own gradient)."""
    gate, workers = Gate(turns), cores()
    torch.set_num_threads(1)
    model = Federation(work).initial().share_memory_()
    sums = [torch.zeros_like(model).share_memory_() for _ in range(workers)]
    pipes = [SPAWN.Pipe() for _ in range(workers)]
    calls = [
        (_worker, (pipes[i][1], work, variant, i, workers, model, sums[i])) for i in range(workers)
    ]  # fmt: skip
    with children(calls):
        for ours, _ in pipes:
            ours.recv()
        server_round, going = 0, gate.ready()
        while going:
            server_round += 1
            for ours, _ in pipes:
                ours.send(server_round)
            for ours, _ in pipes:
                ours.recv()
            torch.sum(torch.stack(sums), 0, out=model)
            going = gate.passed(model.numpy)
        for ours, _ in pipes:
            ours.send(None)


def _worker(
    pipe: Connection, work: Workload, variant: str, index: int, workers: int, model: Tensor, total: Tensor
) -> None:
    torch.set_num_threads(1)
    task = Federation(work)
    own = model.clone()
    step = _steps(task, own, variant)
    pipe.send("ready")
    while (server_round := pipe.recv()) is not None:
        total.zero_()
        for client in work.cohort_of(server_round)[index::workers]:
            own.copy_(model)
            for order in task.orders(client, server_round):
                rows = task.rows[client][order]
                x, y = task.x.index_select(0, rows), task.y.index_select(0, rows)
                for batch in zip(x.split(work.batch_size), y.split(work.batch_size), strict=True):
                    step(*batch)
            total.add_(own, alpha=1 / work.cohort)
        pipe.send("done")


def _steps(task: Federation, own: Tensor, variant: str) -> Step:
    """Return one SGD step on a batch, which changes ``own`` in place."""
    shapes = [parameter.shape for parameter in task.model().parameters()]
    if variant == "by-hand":
        return _by_hand(_views(own, shapes), task.work.lr)
    last = variant == "channels-last"
    forward = {"softmax": _softmax, "mlp": _mlp, "mlp100k": _mlp, "cnn100k": _cnn}[task.work.model]
    lr = task.work.lr
    leaves = [view.requires_grad_() for view in _views(own.detach(), shapes)]

    def step(x: Tensor, y: Tensor) -> None:
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        gradients = torch.autograd.grad(F.cross_entropy(forward(leaves, x, last), y), leaves)
        with torch.no_grad():
            torch._foreach_add_(leaves, gradients, alpha=-lr)

    return step


def _views(vector: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    pieces = vector.split([shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _softmax(p: list[Tensor], x: Tensor, last: bool) -> Tensor:
    return F.linear(x.flatten(1), p[0], p[1])


def _mlp(p: list[Tensor], x: Tensor, last: bool) -> Tensor:
    return F.linear(F.relu(F.linear(x.flatten(1), p[0], p[1])), p[2], p[3])


def _cnn(p: list[Tensor], x: Tensor, last: bool) -> Tensor:
    weights = (p[0], p[2])
    if last:
        weights = tuple(w.contiguous(memory_format=torch.channels_last) for w in weights)
    x = F.max_pool2d(F.relu(F.conv2d(x, weights[0], p[1], padding=2)), 2)
    x = F.max_pool2d(F.relu(F.conv2d(x, weights[1], p[3], padding=2)), 2)
    return F.linear(F.relu(F.linear(x.flatten(1), p[4], p[5])), p[6], p[7])


def _by_hand(p: list[Tensor], lr: float) -> Step:
    """Softmax regression, or a perceptron with one hidden layer, with the gradient written out."""
    classes = torch.arange(CLASSES)

    def step(x: Tensor, y: Tensor) -> None:
        x = x.flatten(1)
        if len(p) == 2:
            delta = _softmax_delta(torch.addmm(p[1], x, p[0].t()), y, classes)
        else:
            hidden = torch.addmm(p[1], x, p[0].t()).relu_()
            delta = _softmax_delta(torch.addmm(p[3], hidden, p[2].t()), y, classes)
            back = torch.mm(delta, p[2]).mul_(hidden > 0)
            p[2].addmm_(delta.t(), hidden, alpha=-lr)
            p[3].sub_(delta.sum(0), alpha=lr)
            delta = back
        p[0].addmm_(delta.t(), x, alpha=-lr)
        p[1].sub_(delta.sum(0), alpha=lr)

    return step


def _softmax_delta(logits: Tensor, y: Tensor, classes: Tensor) -> Tensor:
    return logits.softmax(1).sub_((y[:, None] == classes).float()).div_(len(y))


def variants(work: Workload) -> list[str]:
    """Return the tight loops that there are for a workload's model."""
    return ["autograd", "channels-last"] if work.model.startswith("cnn") else ["autograd", "by-hand"]
