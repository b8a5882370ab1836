"""Replies in an optimizer's codes: the bytes of the formula, the same numbers on every way, refusals."""

from __future__ import annotations

import dataclasses
import tomllib
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from optimizer_experiments import experiment
from torch import nn

from turnout.client import FlatModel, TrainOptions, client_app
from turnout.client.mods import noisy_link
from turnout.client.round_optimizer import RoundOptimizer
from turnout.experiment import Experiment
from turnout.experiment.build import build, make_app
from turnout.simulation import Bernoulli, LocalGrid
from turnout.strategies import FedAvg, StreamingStrategy
from turnout.tasks import Digits
from turnout.wire import ConfigError, find, keys
from turnout.wire.digits import packed_size
from turnout.wire.flower import new_context, request
from turnout.wire.packing import pack
from turnout.wire.step_counts import STEP_COUNTS_STYPE

STEPS = 6
WIDTHS = ((12, 8), (8, 10), (10, 4))
# Of two matrices, (8, 12) and (10, 8), or of one of them: numbers that travel whole, and bytes of marks.
FRUGAL = {
    "columns": ((8 * 3, 2), (10 * 2, 1)),
    "rows": ((2 * 12, 1), (2 * 8, 2)),
    "randk": ((24, 12), (20, 10)),
    "block": ((0, 0),),
}


def trained(options: TrainOptions) -> tuple[FlatModel, Any, Any, dict[int, Array]]:
    """Return a model after STEPS steps, the vectors before and as trained, and its codes by offset."""
    torch.manual_seed(0)
    model = FlatModel(nn.Sequential(*(nn.Linear(n, m) for n, m in WIDTHS)))
    asked, start = RoundOptimizer(options, RecordDict(), 0, 1, STEPS), model.vector()
    optimizer = asked.begin(model, 0.01, lambda key: None)
    for step in range(STEPS):
        model.gradient.copy_(torch.randn(model.size, generator=torch.Generator().manual_seed(step)))
        optimizer.step()
    raw = model.vector()
    asked.end(optimizer, model)
    return model, start, raw, asked.codes(start, model.vector())


def frugal(projector: str, **table: Any) -> TrainOptions:
    density = 0.5 if projector == "block" else 0.25
    table = {"projector": projector, "density": density, "block_order": "ascending", "seed": 3, **table}
    return TrainOptions(
        optimizer="frugal", lr=0.01, local_steps=STEPS, reply="coded", optimizer_options=table
    )


@pytest.mark.parametrize("projector", FRUGAL)
def test_frugal_sends_counts_of_steps_in_the_bytes_of_the_formula(projector: str) -> None:
    model, start, raw, codes = trained(frugal(projector))
    sent, record = model.vector(), model.layout.record(model.vector())
    plain, size, counted = pack(record)[0].size, 0, np.zeros(model.size, bool)
    coded = [spec for spec in model.layout.tensors if spec.offset in codes]
    for spec, (whole, marks) in zip(coded, FRUGAL[projector], strict=True):
        record[spec.name] = codes[spec.offset]
        expected = 16 + marks + 4 * whole + packed_size(spec.size - whole, 2 * STEPS + 1)
        assert len(codes[spec.offset].data) == expected
        size += expected
        piece = slice(spec.offset, spec.offset + spec.size)
        multiples = (start[piece] - sent[piece]) / 0.01
        counted[piece] = np.abs(multiples - np.rint(multiples)) < 1e-4
        assert spec.size - whole <= counted[piece].sum() < spec.size - whole + 5
    dense = 4 * (model.size - sum(spec.size for spec in coded))
    assert 0 <= pack(record)[0].size - size - dense <= 3 * len(record)  # Numbers are aligned behind codes.
    assert pack(record)[0].size < 0.75 * plain
    # What the client has now is what was trained, but for the steps' roundings; other numbers to the bit.
    assert np.array_equal(sent[~counted], raw[~counted])
    assert (np.abs(sent - raw) <= (STEPS + 1) / 2 * np.spacing(np.abs(start) + STEPS * 0.01)).all()
    assert not np.array_equal(start, sent)


def test_entries_of_every_window_of_a_round_travel_whole() -> None:
    one, three = trained(frugal("columns"))[3], trained(frugal("columns", update_gap=2))[3]
    assert all(len(three[offset].data) > len(one[offset].data) + 4 * 8 for offset in one)


def test_frugal_without_a_rule_sends_nothing_for_what_stays() -> None:
    _, _, _, codes = trained(frugal("columns", inactive_rule="no"))
    assert [len(array.data) for array in codes.values()] == [16 + 2 + 4 * 24, 16 + 1 + 4 * 20]


@pytest.mark.parametrize(
    ("quantizer", "bits"), [("int8", 8), ("int4", 4), ("int2", 1.6), ("fp8", 8), (0.01, 6)]
)
def test_eco_sends_codes_and_scales_and_loses_nothing(quantizer: Any, bits: float) -> None:
    options = TrainOptions(
        optimizer="eco-sgd",
        optimizer_state="keep",
        lr=0.01,
        local_steps=STEPS,
        reply="coded",
        optimizer_options={"quantizer": quantizer},
    )
    model, _, raw, codes = trained(options)
    assert np.array_equal(model.vector(), raw)
    for array, numbers, rows in zip(codes.values(), (96, 80), (8, 10), strict=True):
        scales = 1 if isinstance(quantizer, float) else rows
        assert abs(len(array.data) - 8 - 4 * scales - numbers * bits / 8) <= (4 if scales == 1 else 1)


def test_a_rate_that_changes_within_the_round_is_refused() -> None:
    model = FlatModel(nn.Sequential(*(nn.Linear(n, m) for n, m in WIDTHS)))
    asked = RoundOptimizer(frugal("columns"), RecordDict(), 0, 1, STEPS)
    optimizer = asked.begin(model, 0.01, lambda key: None)
    model.gradient.fill_(1.0)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.005
    optimizer.step()
    with pytest.raises(ConfigError, match=r"from 0\.01 to 0\.005 within a round"):
        asked.end(optimizer, model)


def test_what_else_moves_a_weight_is_noticed() -> None:
    """It is no step of FRUGAL's; from ECO's grid the tensor is off, and travels as it is."""
    for method, coded in (("frugal", None), ("eco-sgd", 1)):
        model = FlatModel(nn.Sequential(*(nn.Linear(n, m) for n, m in WIDTHS)))
        options = frugal("rows", density=0.0)
        if coded is not None:
            options = dataclasses.replace(options, optimizer=method, optimizer_options={})
        asked, start = RoundOptimizer(options, RecordDict(), 0, 1, STEPS), model.vector()
        optimizer = asked.begin(model, 0.01, lambda key: None)
        model.parameters[0] += 0.003
        if coded is None:
            with pytest.raises(ConfigError, match="Something beside the optimizer"):
                asked.end(optimizer, model)
            continue
        moved = model.vector()
        asked.end(optimizer, model)
        assert np.array_equal(model.vector(), moved)
        assert list(asked.codes(start, moved)) == [12 * 8 + 8]


# --- federations ---------------------------------------------------------------------------------------

TASK = Digits(num_clients=3, model="mlp")
CLIENTS: dict[str, dict[str, Any]] = {
    "frugal": {"optimizer_options": {"projector": "columns", "update_gap": 4}},
    "eco-adamw": {"optimizer_options": {"quantizer": "int4"}, "optimizer_state": "keep"},
}


def app_of(optimizer: str, **more: Any) -> ClientApp:
    options = {"lr": 0.01, "local_steps": 4, "batch_size": 16, **CLIENTS[optimizer], **more}
    return client_app(TASK, optimizer=optimizer, **options)


class Posted(ClientApp):
    """An app that hides what another is, so that all passes through messages; and what they weighed."""

    def __init__(self, app: ClientApp) -> None:
        super().__init__()
        self.weights: list[int] = []

        @self.train()
        def train(message: Message, context: Context) -> Message:
            answer = app(message, context)
            self.weights.append(pack(answer.content[keys.ARRAYS])[0].size)
            return answer


def run(name: str, app: ClientApp) -> StreamingStrategy:
    kind = find("strategy", name).target
    rates = {"participation": 0.7} if name in ("unbiased-fedavg", "fedstale") else {}
    strategy: StreamingStrategy = kind(**rates)
    grid = LocalGrid(app, 3, participation=Bernoulli([0.7, 0.5, 0.9]), executor="serial")
    strategy.start(grid, TASK.initial_arrays(), num_rounds=3)
    assert all(report.outcome == "ok" for report in strategy.reports)
    return strategy


@pytest.mark.parametrize("optimizer", CLIENTS)
@pytest.mark.parametrize("name", ["fedavg", "fedstale", "fedau", "mifa", "fedprox", "feddyn"])
def test_strategies_see_the_same_numbers_to_the_bit(name: str, optimizer: str) -> None:
    posted = Posted(app_of(optimizer, reply="coded"))
    through_messages = run(name, posted)
    assert np.array_equal(run(name, app_of(optimizer, reply="coded")).x, through_messages.x)
    dense = Posted(app_of(optimizer))
    plain = run(name, dense)
    assert max(posted.weights) < 0.6 * min(dense.weights)
    if optimizer == "frugal" and name in ("fedprox", "feddyn"):
        return  # Where only the proximal term has a gradient, its sign is that of the steps' roundings.
    if optimizer == "frugal":  # Its steps are rounded once instead of one by one.
        np.testing.assert_allclose(through_messages.x, plain.x, rtol=0, atol=1e-5)
    else:
        assert np.array_equal(through_messages.x, plain.x)


def ask(app: ClientApp, strategy: StreamingStrategy) -> tuple[Message, Message]:
    grid = LocalGrid(app, 1, executor="serial")
    (asked,) = strategy.configure_train(1, TASK.initial_arrays(), ConfigRecord(), grid)
    return asked, app(asked, new_context(node_id=0, node_config={"partition-id": 0}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-1], "wrong-layout"),
        (lambda data: data[:32] + b"\xff" * (len(data) - 32), "wrong-layout|non-finite"),
        (lambda data: data[:24] + b"\0\0\xc0\x7f" + data[28:], "non-finite"),
    ],
)
def test_hostile_codes_are_refused_and_the_round_goes_on(damage: Any, reason: str) -> None:
    strategy = FedAvg()
    _, answer = ask(app_of("frugal", reply="coded"), strategy)
    sent = answer.content["arrays"]
    assert isinstance(sent, ArrayRecord)
    name = next(name for name, array in sent.items() if array.stype == STEP_COUNTS_STYPE)
    array, before = sent[name], strategy.x.copy()
    sent[name] = Array(array.dtype, array.shape, array.stype, damage(array.data))
    strategy.aggregate_train(1, [answer])
    (report,) = strategy.reports
    assert report.outcome == "rejected"
    assert report.reason.split(":")[0] in reason.split("|")
    assert np.array_equal(strategy.x, before)


def test_a_model_that_is_not_finite_is_refused_as_one() -> None:
    strategy = FedAvg()
    _, answer = ask(app_of("frugal", reply="coded", lr=1e37), strategy)
    strategy.aggregate_train(1, [answer])
    assert strategy.reports[0].reason.startswith(("non-finite", "too-large"))


def test_other_local_updates_have_no_codes() -> None:
    app = app_of("frugal", reply="coded")
    context = new_context(node_id=0, node_config={"partition-id": 0})
    config = ConfigRecord({"server-round": 1, "local-update": "anchor"})
    content = RecordDict({"arrays": TASK.initial_arrays(), "config": config})
    with pytest.raises(Exception, match="reply='coded' is for local updates that train"):
        app(request(content, dst_node_id=0), context)


CODED = 'optimizer = "frugal"\nreply = "coded"\n'
REFUSED = [
    ('reply = "short"', "should be 'dense' or 'coded'"),
    ('reply = "coded"', "optimizer 'sgd' has no code"),
    ('optimizer = "adamw"\nreply = "coded"', "optimizer 'adamw' has no code"),
    ('optimizer = "auon"\nreply = "coded"', "AuON has no code"),
    (f"{CODED}weight_decay = 0.1", "set it to 0"),
    (f'{CODED}optimizer_options = {{ projector = "galore" }}', "moves every entry by Adam"),
    (f'{CODED}optimizer_options = {{ inactive_rule = "sgd" }}', "by their gradients"),
    (f'{CODED}[strategy]\nname = "fedamd"', "strategy 'fedamd' asks for the local update 'anchor'"),
    (f'{CODED}[strategy]\nname = "scaffold"', "replies other things"),
    (f'{CODED}[strategy]\nname = "rerce-fed"', "replies other things"),
    (f'{CODED}[strategy]\nname = "eggroll"', "replies other things"),
    (f'{CODED}[strategy]\nname = "flwr:FedAvg"', "reads plain arrays"),
    (f'{CODED}[link]\nname = "noisy"\nsigma_up = 0.1', "link 'noisy' changes or reads"),
]


@pytest.mark.parametrize(("client", "words"), REFUSED)
def test_impossible_choices_are_refused(client: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Experiment.from_dict(tomllib.loads(experiment(client)))


def test_mods_are_refused() -> None:
    with pytest.raises(ConfigError, match="use reply='dense', or no mods"):
        app_of("frugal", reply="coded", mods=[noisy_link(0.1)])


@pytest.mark.parametrize(
    ("adapter", "client"),
    [
        ("lora", CODED),
        ("lora", f'{CODED}optimizer_options = {{ projector = "columns" }}'),
        ("ist", 'optimizer = "eco-sgd"\nreply = "coded"\noptimizer_state = "keep"'),
    ],
)
def test_adapters_reply_in_codes(adapter: str, client: str) -> None:
    """Also where parts of a model are put back after a step, and unchanged tensors left out."""
    text = f'{experiment(client, 2)}\n[peft]\nname = "{adapter}"'
    made = Experiment.from_dict(tomllib.loads(text))
    vectors = []
    for post in (Posted, lambda app: app):
        parts = build(made)
        app = post(make_app(made, parts.task))
        parts.strategy.start(LocalGrid(app, 6, executor="serial"), parts.task.initial_arrays(), num_rounds=2)
        assert all(report.outcome == "ok" for report in parts.strategy.reports)
        vectors.append(parts.strategy.x.copy())
    assert np.array_equal(vectors[0], vectors[1])
