"""Tight loops for one device: a client after another, and all clients of a round as one batched program."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fleet_parties import Turns
from simulators_turns import Gate, cores
from simulators_work import Federation, Workload

Round = Callable[[Tensor, int], Tensor]  # From a model and the round's number to the next model.


def device_loop(turns: Turns, work: Workload, variant: str, chunk: int) -> None:
    """``variant``: "one by one", or "batched" with at most ``chunk`` clients at once."""
    torch.set_num_threads(cores())
    task, gate = Federation(work), Gate(turns)
    model = task.initial().to(work.device)
    round_of = _one_by_one(task) if variant == "one by one" else _batched(task, chunk)
    server_round, going = 0, gate.ready()
    while going:
        server_round += 1
        model = round_of(model, server_round)
        going = gate.passed(partial(_host, model))


def _host(model: Tensor) -> Any:
    return model.cpu().numpy()


def _one_by_one(task: Federation) -> Round:
    work, module = task.work, task.model().to(task.work.device)
    own = torch.empty_like(task.initial(), device=work.device)
    leaves = list(module.parameters())
    for leaf, piece in zip(leaves, own.split([leaf.numel() for leaf in leaves]), strict=True):
        leaf.data = piece.view_as(leaf)

    def round_of(model: Tensor, server_round: int) -> Tensor:
        total = torch.zeros_like(model)
        for client in work.cohort_of(server_round):
            own.copy_(model)
            for order in task.orders(client, server_round):
                rows = task.rows[client][order]
                x, y = task.x.index_select(0, rows), task.y.index_select(0, rows)
                for a, b in zip(x.split(work.batch_size), y.split(work.batch_size), strict=True):
                    gradients = torch.autograd.grad(cross_entropy(module(a), b), leaves)
                    with torch.no_grad():
                        torch._foreach_add_(leaves, gradients, alpha=-work.lr)
            total.add_(own, alpha=1 / work.cohort)
        return total

    return round_of


def _batched(task: Federation, chunk: int) -> Round:
    work, module = task.work, task.model().to(task.work.device)
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    step = vmap(grad(lambda p, x, y: cross_entropy(functional_call(module, p, (x,)), y)))

    def round_of(model: Tensor, server_round: int) -> Tensor:
        total, cohort = torch.zeros_like(model), work.cohort_of(server_round)
        for start in range(0, len(cohort), chunk):
            clients = cohort[start : start + chunk]
            stacked = model.expand(len(clients), -1).clone()
            own = _views(stacked, shapes)
            orders = [list(task.orders(client, server_round)) for client in clients]
            for epoch in range(work.epochs):
                order = torch.stack([mine[epoch] for mine in orders])
                rows = task.rows[torch.tensor(clients, device=work.device)].gather(1, order)
                for piece in rows.split(work.batch_size, 1):
                    gradients = step(own, task.x[piece], task.y[piece])
                    torch._foreach_add_(list(own.values()), [gradients[name] for name in own], alpha=-work.lr)
            total.add_(stacked.sum(0), alpha=1 / work.cohort)
        return total

    return round_of


def _views(stacked: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    pieces = stacked.split([shape.numel() for shape in shapes.values()], 1)
    return {
        name: piece.view(len(stacked), *shape)
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }
