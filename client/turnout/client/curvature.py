"""A client's curvature statistics as a record to send: packed upper triangles, float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord
from torch import Tensor

from turnout.client.flat_model import FlatModel
from turnout.client.minibatches import generator
from turnout.optim.loss_curvature_edit import Labels, collect_curvature
from turnout.tasks.task import ClientData, Task
from turnout.wire.arrays import as_array
from turnout.wire.errors import ConfigError

_CHUNK: Final = 512


def curvature_record(
    model: FlatModel, task: Task, data: ClientData, config: Any, seeds: tuple[int, int]
) -> ArrayRecord:
    """Return "LAYER/A" and "LAYER/G" for the layers that the request's ``config`` names.

    They are sums over the client's examples, shape (n (n + 1) / 2,) each. Sampled labels follow from
    ``seeds``. Raises `ConfigError` for a request without layers or with impossible ones.
    """
    layers = config.get("layers") if isinstance(config, ConfigRecord) else None
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise ConfigError("the request's config names no layers; send layers, a list of names.")
    drawn = int(generator(*seeds, 0).integers(2**63))
    found = collect_curvature(
        model.module,
        _chunks(model, data),
        task.loss,
        cast(list[str], layers),
        labels=cast(Labels, str(config.get("labels", "dataset"))),
        generator=torch.Generator(data.x.device).manual_seed(drawn),
    )
    record = ArrayRecord()
    for name, sums in found.items():
        record[f"{name}/A"] = as_array(_packed(sums.inputs))
        record[f"{name}/G"] = as_array(_packed(sums.gradients))
    return record


def _chunks(model: FlatModel, data: ClientData) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(data), _CHUNK):
        piece = slice(start, start + _CHUNK)
        yield model.inputs(data.x[piece]), data.y[piece]


def _packed(matrix: Tensor) -> Any:
    rows, columns = torch.triu_indices(*matrix.shape).to(matrix.device)
    return matrix[rows, columns].float().cpu().numpy()
