"""IST's invariants: which layers rest, probes, scores (the draws: tests/allocation)."""

from __future__ import annotations

import copy

import pytest
import torch
from flwr.app import ConfigRecord, Context, RecordDict
from torch import Tensor, nn

from turnout.allocation.ist import layer_count
from turnout.client import client_app
from turnout.client.training_parts import TrainingParts
from turnout.peft import Adapted, AdaptedTask, IstConfig, LoraConfig, attach
from turnout.peft.ist import Ist, block_of
from turnout.tasks import Digits
from turnout.wire import ConfigError, keys


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.tanh(self.up(x)))
        return y


def model(count: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(count)))


def ist(count: int = 4, **options: object) -> tuple[Adapted, Ist]:
    config = IstConfig(**{"base": {"name": "lora", "r": 2}, **options})  # type: ignore[arg-type]
    adapted = attach(model(count), config)
    part = adapted.companions["ist"]
    assert isinstance(part, Ist)
    return adapted, part


X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))


def train(adapted: Adapted, steps: int, **parts: object) -> torch.optim.Optimizer:
    module = adapted.module
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.05)
    part = TrainingParts(module)
    part.start(1, (0, 0, 1))

    def loss() -> Tensor:
        return (module(X) - Y).square().mean()

    for _ in range(steps):
        part.before_step(loss)
        optimizer.zero_grad()
        loss().backward()
        part.after_gradient()
        optimizer.step()
        part.leave_step()
    part.end()
    return optimizer


def test_blocks_are_told_by_their_number() -> None:
    assert block_of("encoder.layer.3.attention.q") == "encoder.layer.3"
    assert block_of("encoder.layer.13.attention.q") == "encoder.layer.13"
    assert block_of("0.up") == "0"
    assert block_of("head.out") == "head.out"
    assert ist()[1].names == ("0", "1", "2", "3")


def test_with_all_layers_it_is_the_adapter_itself() -> None:
    adapted, _ = ist(n_update_ratio=1.0, mode="local", score_lr=0.0)
    plain = attach(model(), LoraConfig(r=2))
    train(adapted, 5)
    train(plain, 5)
    for name, tensor in plain.trainable_state_dict().items():
        assert torch.equal(adapted.trainable_state_dict()[name], tensor)


def test_layers_that_rest_keep_their_bits_and_their_moments() -> None:
    adapted, part = ist()
    part.active.copy_(torch.tensor([0, 1, 0, 0], dtype=torch.uint8))
    before = copy.deepcopy(adapted.trainable_state_dict())
    optimizer = train(adapted, 4)
    for name, tensor in adapted.trainable_state_dict().items():
        assert torch.equal(tensor, before[name]) is not name.startswith("1."), name
    named = dict(adapted.module.named_parameters())
    touched = {name for name, p in named.items() if p in optimizer.state}
    assert touched == {name for name in before if name.startswith("1.")}
    assert all(p.requires_grad for name, p in named.items() if name in before)


def test_local_draws_change_from_step_to_step_and_follow_the_seed() -> None:
    def draws(seed: tuple[int, ...]) -> list[set[int]]:
        adapted, part = ist(mode="local", score_lr=0.0)
        part.start_training(1, seed)
        drawn = []
        for _ in range(12):
            part.before_step(lambda: torch.zeros(()))
            drawn.append({id(t) for t in part.resting()})
        names = {id(p): name for name, p in adapted.module.named_parameters()}
        return [{names[i] for i in rest} for rest in drawn]  # type: ignore[misc]

    assert draws((0, 1)) == draws((0, 1)) != draws((0, 2))
    assert len({frozenset(d) for d in draws((0, 1))}) > 1
    assert {len(d) for d in draws((0, 1))} == {
        3 * 4
    }  # Three blocks of four, two tensors in each of two layers.


def probed(**options: object) -> tuple[Adapted, Ist, list[float]]:
    adapted, part = ist(**options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in adapted.trainable_state_dict().values():
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    part.start_training(1, (0,))
    seen: list[float] = []

    def loss() -> Tensor:
        value = (adapted.module(X) - Y).square().mean()
        seen.append(float(value.detach()))
        return value

    part.probe(loss)
    return adapted, part, seen


def test_no_damping_no_change() -> None:
    _, part, losses = probed(suppression=1.0)
    assert len(losses) == 3
    assert max(losses) - min(losses) < 1e-6
    assert part.running_scores.abs().max() < 1e-5


def test_a_probe_leaves_nothing_behind() -> None:
    adapted, part, losses = probed()
    assert len({round(value, 7) for value in losses}) == 3
    assert part.running_scores.any()
    assert not any(layer._forward_hooks for layer in adapted.layers.values())
    twin = attach(model(), LoraConfig(r=2))
    twin.load_trainable_state_dict(adapted.trainable_state_dict())
    assert torch.equal(adapted.module(X), twin.module(X))


def test_probes_of_a_client_have_no_dropout_and_leave_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropping(Digits):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 10))

    config = IstConfig(base={"name": "lora", "r": 2}, suppression=1.0, interval=1)
    task = AdaptedTask(Dropping(num_clients=1), config)
    losses: list[float] = []
    monkeypatch.setattr(
        "turnout.peft.ist.score_change", lambda q, damped, found, lr: losses.extend(found) or q
    )
    app = client_app(task, lr=0.1, local_steps=2)
    modes: list[bool] = []
    monkeypatch.setattr(Ist, "after_gradient", lambda part: modes.append(part.training))
    content = RecordDict(
        {keys.ARRAYS: task.initial_arrays(), keys.CONFIG: ConfigRecord({keys.SERVER_ROUND: 2})}
    )
    app.trainer.update(content, Context(0, 0, {"partition-id": 0}, RecordDict(), {}))
    assert modes == [True, True]
    for step in (losses[:3], losses[3:]):  # Damped by 1, on one batch, without dropout: the same each time.
        assert len(step) == 3
        assert max(step) - min(step) < 1e-6


def test_of_few_layers_at_least_one_trains() -> None:
    assert [layer_count(0.25, layers) for layers in (1, 3, 4, 8)] == [1, 1, 1, 2]


def test_damping_is_a_factor_on_the_change_of_the_weight() -> None:
    adapted, _, losses = probed(count=2, probes=1, n_suppress_ratio=1.0, suppression=0.5)
    twin = attach(model(2), LoraConfig(r=2, lora_alpha=4))  # Twice the alpha's half.
    twin.load_trainable_state_dict(
        {
            name: 0.5 * tensor if name.endswith("lora_B") else tensor
            for name, tensor in adapted.trainable_state_dict().items()
        }
    )
    halved = attach(model(2), LoraConfig(r=2, lora_alpha=8))
    halved.load_trainable_state_dict(twin.trainable_state_dict())
    assert float((halved.module(X) - Y).square().mean().detach()) == pytest.approx(losses[0], rel=1e-4)


def test_few_layers_do_not_hang_the_draw_of_probes() -> None:
    _, part, losses = probed(count=1, probes=3)
    assert len(losses) == 3
    assert torch.isfinite(part.running_scores).all()


def test_a_harmful_layer_is_scored_up_and_a_needed_one_down() -> None:
    adapted, part = ist(interval=1)
    torch.manual_seed(5)
    target = model()
    noise, needed = adapted.layers["2.down"], adapted.layers["0.down"]
    with torch.no_grad():
        for layer, size in ((noise, 0.6), (needed, 0.6)):
            layer.lora_B.copy_(size * torch.randn(6, 2))  # type: ignore[union-attr,operator]
            layer.lora_A.copy_(size * torch.randn(2, 6))  # type: ignore[union-attr,operator]
        target[0].down.weight += needed.delta_weight()  # type: ignore[union-attr,operator]
    with torch.no_grad():
        goal = target(X)
    for server_round in range(1, 41):
        part.start_training(server_round, (0, server_round))
        part.probe(lambda: (adapted.module(X) - goal).square().mean())
    q = part.running_scores
    assert q[2] == q.max() > 0
    assert q[0] == q.min() < 0


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="lora"):
        IstConfig(base={"name": "ist"})
    with pytest.raises(ConfigError, match="Did you mean 'lora'"):
        IstConfig(base={"name": "lorra"})
    with pytest.raises(ConfigError, match="rank"):
        IstConfig(base={"name": "lora", "rank": 3})
    with pytest.raises(ConfigError, match="budget of its own"):
        IstConfig(base={"name": "adalora", "total_step": 100})
    with pytest.raises(ConfigError, match="n_update_ratio"):
        IstConfig(n_update_ratio=0)
