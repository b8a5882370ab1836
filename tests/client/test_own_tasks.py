"""Own tasks with something wrong: told before the run, or as that client's failure on every executor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from turnout.client import client_app
from turnout.experiment.adapters import couple
from turnout.peft import AdaptedTask
from turnout.simulation import Bernoulli, LocalGrid
from turnout.strategies import FedAvg
from turnout.tasks import ClientData, Task
from turnout.wire import LayoutError, find, view

Data = Callable[[int], ClientData]


class Own(Task):
    """Three clients with 4, 5 and 6 examples."""

    name = "own"
    num_clients = 3

    def __init__(self, change: Callable[[nn.Module], object] = lambda model: None, data: Data | None = None):
        self._change, self._given = change, data or examples

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        self._change(model)
        return model

    def client_data(self, client: int) -> ClientData:
        return self._given(client)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, y)


def examples(client: int) -> ClientData:
    generator = torch.Generator().manual_seed(client)
    count = 4 + client
    return ClientData(
        torch.randn(count, 3, generator=generator), torch.randint(3, (count,), generator=generator)
    )


def tie(model: nn.Module) -> None:
    model[2].weight = model[0].weight  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tie, "'0.weight' and '2.weight' are one tensor.*untie"),
        (lambda model: model.bfloat16(), r"'0.weight' is torch.bfloat16; make the whole model torch.float32"),
        (lambda model: model.half(), r"'0.weight' is torch.float16; make the whole model torch.float32"),
        (lambda model: model[2].double(), r"'0.weight' is torch.float32; make the whole model torch.float64"),
        (
            lambda model: model.register_parameter("running_scale", nn.Parameter(torch.ones(1))),
            "'running_scale'.*never be trained.*not begin with 'running_'",
        ),
        (lambda model: model.apply(strip), "no float parameter"),
    ],
)
def test_a_model_that_no_client_can_train_is_refused_before_the_run(change, message):
    with pytest.raises(LayoutError, match=message):
        Own(change).initial_arrays()


def strip(module: nn.Module) -> None:
    module._parameters.clear()


def broken(client: int) -> ClientData:
    raise OSError("the disk of this client is gone")


def short(client: int) -> ClientData:
    return ClientData(examples(client).x, examples(client).y[1:])


def keyed(client: int) -> ClientData:
    return ClientData({"x": examples(client).x}, examples(client).y)  # type: ignore[arg-type]


@pytest.mark.parametrize("executor", ["serial", "batched"])
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (broken, "the disk of this client is gone"),
        (short, "has 5 rows of x but 4 of y; client_data must return one target for each input"),
        (keyed, "x is a dict; client_data must return two tensors"),
    ],
)
def test_data_that_cannot_be_used_are_that_clients_failure(wrong, reason, executor):
    task = Own(data=lambda client: wrong(client) if client == 1 else examples(client))
    grid = LocalGrid(client_app(task, lr=0.5, batch_size=2), 3, executor=executor, workers=1)
    strategy, initial = FedAvg(), task.initial_arrays()
    trained = strategy.start(grid, initial, num_rounds=2).arrays
    outcomes = {report.client: report for report in strategy.reports}
    assert reason in outcomes[1].reason
    assert [outcomes[client].outcome for client in (0, 1, 2)] == ["ok", "failed", "ok"]
    assert not np.array_equal(view(initial["0.weight"]), view(trained["0.weight"]))


@pytest.mark.parametrize("name", ["tera", "ist"])
def test_a_client_that_breaks_off_within_a_step_leaves_the_next_one_a_whole_model(name):
    def data(client: int) -> ClientData:
        given = examples(client)
        return ClientData(given.x, given.y + 3) if client == 2 else given  # No such classes.

    def trained(task: Task, participation: list[float]) -> dict[str, np.ndarray]:
        adapted = AdaptedTask(task, find("adapter", name).target())
        grid = LocalGrid(client_app(adapted, lr=0.5), 3, participation=Bernoulli(participation))
        strategy = FedAvg()
        couple(strategy, adapted.config, lambda: adapted, None)
        result = strategy.start(grid, adapted.initial_arrays(), num_rounds=2)
        assert len(strategy.reports) == (3 if participation[2] == 1.0 else 2)
        return {name: view(array) for name, array in result.arrays.items()}

    with_it, without = (trained(Own(data=data), [1.0, 1.0, p]) for p in (1.0, 1e-9))
    assert all(np.array_equal(with_it[key], without[key]) for key in without)


def test_choosing_an_executor_does_not_stumble_over_the_first_client():
    task = Own(data=lambda client: broken(client) if client == 0 else examples(client))
    grid = LocalGrid(client_app(task), 3, executor="auto", workers=1, exact=False)
    assert grid.executor.startswith("batched")
