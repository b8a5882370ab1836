"""What crosses a real gRPC connection for every adapter, and in codes: the formula's bytes, little else."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from turnout.allocation import kept_parts, narrowed
from turnout.allocation.adalora import TRIPLETS
from turnout.client import client_app
from turnout.client.node import run_node
from turnout.peft import Adapted, AdaptedTask
from turnout.server.fleet import FleetGrid, FleetServer, servicer
from turnout.tasks import Digits
from turnout.wire import as_array, keys, view
from turnout.wire.framing import Chunk
from turnout.wire.step_counts import STEP_COUNTS_STYPE

sys.path[:0] = [str(Path(__file__).parents[1] / "adapters")]

from adapter_rows import ROWS, SIDES, Row, ids  # noqa: E402 - found by the line above

# Of a reply: names and shapes of its tensors, the metrics, the frames.
HEAD, PER_TENSOR = 400, 100
MASK = np.array([0, 1, 0, 0], np.uint8)


# Counts of 2 steps, -2 to 2: 24 of them go into 7 bytes.
CODED: dict[str, Any] = {"optimizer": "frugal", "lr": 0.01, "reply": "coded"}
CODED |= {"optimizer_options": {"projector": "columns", "density": 0.25}}


class Narrow(Digits):
    """Digits with a layer of the sides that the rows are written for."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, SIDES[1]), nn.ReLU(), nn.Linear(*reversed(SIDES)))


def task_of(row: Row) -> AdaptedTask:
    return AdaptedTask(Narrow(num_clients=1), replace(row.config, target_modules=("3",)))


@dataclass
class Connection:
    """A server with one client, who trains the adapter that a request names; without one, `CODED`."""

    grid: FleetGrid
    server: FleetServer
    frames: list[int]

    def ask(self, row: Row | None, arrays: ArrayRecord, **config: Any) -> tuple[ArrayRecord, int, int]:
        """Return the reply's arrays, their bytes as the server counts them, and those of all its frames."""
        config |= {keys.SERVER_ROUND: 1, "row": -1 if row is None else ROWS.index(row)}
        content = RecordDict({keys.ARRAYS: arrays, keys.CONFIG: ConfigRecord(config)})
        before, framed = self.server.counters.received_bytes, sum(self.frames)
        message = self.grid.create_message(content, "train", 0, "1")
        (reply,) = self.grid.send_and_receive([message], timeout=30)
        assert not reply.has_error(), reply.error
        received = self.server.counters.received_bytes - before
        return reply.content[keys.ARRAYS], received, sum(self.frames) - framed  # type: ignore[return-value]


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    apps: dict[int, ClientApp] = {}
    node_app, frames, decode = ClientApp(), [], servicer.decode_client

    @node_app.train()
    def train(message: Message, context: Context) -> Message:
        number: Any = message.content[keys.CONFIG]["row"]
        if number not in apps:
            options = CODED if number < 0 else {"lr": 0.1}
            task = Narrow(num_clients=1) if number < 0 else task_of(ROWS[number])
            apps[number] = client_app(task, local_steps=2, **options)
        return apps[number](message, context)

    def counting(raw: bytes) -> Any:
        frame = decode(raw)
        if isinstance(frame, Chunk) or frame.WhichOneof("body") in ("ready", "batch"):
            frames.append(len(raw))
        return frame

    servicer.decode_client = counting
    try:
        with FleetServer(num_clients=1) as server:
            folder = tmp_path_factory.mktemp("node")
            arguments = {"name": "node", "state_dir": folder, "workers": 1}
            node = threading.Thread(
                target=run_node, args=(server.address, node_app, range(1)), kwargs=arguments
            )
            node.start()
            grid = FleetGrid(server, wait=30)
            grid.start_round(1)
            yield Connection(grid, server, frames)
        node.join(timeout=30)
    finally:
        servicer.decode_client = decode


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_a_reply_has_the_bytes_of_the_formula(row: Row, connection: Connection) -> None:
    task = task_of(row)
    beside = [t.nbytes for t in Adapted.of(task.model()).allocation_state().values()]
    arrays, received, framed = connection.ask(row, task.initial_arrays())
    numbers = 4 * row.count(*SIDES) + sum(beside)
    padding = received - numbers
    assert 0 <= padding <= (7 if beside else 0)  # Numbers are aligned behind masks of single bytes.
    assert received <= framed <= received + HEAD + PER_TENSOR * len(arrays)


def test_of_fixed_ranks_only_the_triplets_that_are_left_travel(connection: Connection) -> None:
    row = next(row for row in ROWS if row.slug == "adalora")
    arrays = task_of(row).initial_arrays()
    arrays["3.lora_E"] = as_array(np.array([[0], [1], [0], [0]], np.float32))
    arrays["3.rank_mask"] = as_array(MASK)
    counters, (d_out, d_in) = connection.server.counters, SIDES
    replies, sent = [], []
    for request in (arrays, narrowed(arrays, dict(kept_parts({"3.rank_mask": MASK}, TRIPLETS)))):
        before = counters.sent_bytes
        replied, received, _ = connection.ask(row, request, **{keys.PARTIAL: True})
        assert received == 4 * (d_out + d_in + 1) + 4 * (1 + 4)  # And a byte of the mask, a score of each.
        np.testing.assert_array_equal(view(replied["3.lora_A"]).shape, (1, d_in))
        assert not np.array_equal(view(replied["3.lora_A"])[0], view(arrays["3.lora_A"])[1])
        sent.append(counters.sent_bytes - before)
        replies.append({name: view(array).tobytes() for name, array in replied.items()})
    # The second request is less by the three triplets, and by a few digits of its sizes.
    assert 0 <= sent[0] - sent[1] - 4 * 3 * (d_out + d_in + 1) <= 20
    assert replies[0] == replies[1]


def test_counts_of_steps_are_what_crosses(connection: Connection) -> None:
    arrays = Narrow(num_clients=1).initial_arrays()
    replied, received, framed = connection.ask(None, arrays)
    d_out, d_in = SIDES  # The hidden layer of (d_in, 64) is projected, the last one is the output layer.
    counted, active = d_in * 48, d_in * 16
    coded = 16 + 8 + 4 * active + 7 * -(-counted // 24)
    dense = 4 * (d_in + d_out * d_in + d_out)
    assert 0 <= received - coded - dense <= 7
    assert received < 0.5 * 4 * (d_in * 64) + dense
    assert received <= framed <= received + HEAD + PER_TENSOR * len(arrays)
    assert [name for name, array in replied.items() if array.stype == STEP_COUNTS_STYPE] == ["1.weight"]
