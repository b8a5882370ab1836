"""What every optimizer does: trains, resumes to the bit, takes closures and groups, refuses the rest."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from optimizer_table import ROWS, Problem, Row, pickled, same
from torch import nn

from turnout.optim import CLASSP, ECOSGD, FRUGAL, AuON, ECOAdamW, HybridAuON
from turnout.wire import ConfigError, methods

every = pytest.mark.parametrize("row", ROWS, ids=str)
# One of each class is enough where only the base is asked.
each_class = pytest.mark.parametrize("row", {r.kind: r for r in reversed(ROWS)}.values(), ids=str)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem()


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state after a trip through a file that may hold tensors and plain values only."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_table_has_every_registered_optimizer() -> None:
    assert {row.kind for row in ROWS} == {entry.target for entry in methods("optimizer")}


@every
def test_it_trains(row: Row, problem: Problem) -> None:
    module = problem.module()
    before = float(problem.loss(module).detach())
    problem.train(module, row.of(module), range(40))
    assert float(problem.loss(module).detach()) < 0.8 * before


@every
def test_resumed_equals_uninterrupted_to_the_bit(row: Row, problem: Problem) -> None:
    module = problem.module()
    optimizer = row.of(module)
    problem.train(module, optimizer, range(10))
    resumed = copy.deepcopy(module)
    tree = saved(optimizer)
    other = row.of(resumed)
    other.load_state_dict(tree)
    problem.train(module, optimizer, range(10, 25))
    problem.train(resumed, other, range(10, 25))
    assert same(module, resumed)
    assert str(optimizer.state_dict()) == str(other.state_dict())


@every
def test_state_dicts_are_restored_with_their_dtypes(row: Row, problem: Problem) -> None:
    module = problem.module().to(torch.bfloat16)
    module.bfloat16()
    optimizer = row.of(module)
    problem_16 = copy.copy(problem)
    problem_16.x = problem.x.bfloat16()
    problem_16.train(module, optimizer, range(3))
    other = row.of(copy.deepcopy(module))
    other.load_state_dict(saved(optimizer))
    mine, restored = (list(o.state.values()) for o in (optimizer, other))
    kinds = [{k: v.dtype for k, v in s.items()} for s in mine]
    assert kinds == [{k: v.dtype for k, v in s.items()} for s in restored]
    assert all(torch.isfinite(p).all() for p in module.parameters())


@every
def test_equal_seeds_give_equal_bits(row: Row, problem: Problem) -> None:
    first, second = problem.module(), problem.module()
    torch.manual_seed(0)
    problem.train(first, row.of(first), range(10))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    problem.train(second, row.of(second), range(10))
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"
    assert same(first, second)


@every
def test_foreach_gives_the_same_bits(row: Row, problem: Problem) -> None:
    one, all_at_once = problem.module(), problem.module()
    problem.train(one, row.of(one, foreach=False), range(10))
    problem.train(all_at_once, row.of(all_at_once, foreach=True), range(10))
    assert same(one, all_at_once)


@every
def test_closures(row: Row, problem: Problem) -> None:
    first, second = problem.module(), problem.module()
    optimizer, plain = row.of(first), row.of(second)

    def closure() -> float:
        optimizer.zero_grad()
        loss = problem.loss(first)
        loss.backward()
        return float(loss.detach())

    for _ in range(3):
        expected = float(problem.loss(second).detach())
        plain.zero_grad()
        problem.loss(second).backward()
        plain.step()
        assert optimizer.step(closure) == expected
    assert same(first, second)


@every
def test_parameters_without_a_gradient_stay(row: Row, problem: Problem) -> None:
    module = problem.module()
    optimizer = row.of(module)
    module[0].requires_grad_(False)
    before = copy.deepcopy(module[0])
    problem.train(module, optimizer, range(9))
    assert same(before, module[0])
    module[0].requires_grad_(True)
    problem.train(module, optimizer, range(9, 12))
    assert not same(before, module[0])


@each_class
def test_copies_and_pickles_go_on_to_the_bit(row: Row, problem: Problem) -> None:
    module = problem.module()
    optimizer = row.of(module)
    problem.train(module, optimizer, range(3))
    copies = [copy.deepcopy((module, optimizer)), pickled((module, optimizer))]
    problem.train(module, optimizer, range(3, 8))
    for other, its_optimizer in copies:
        problem.train(other, its_optimizer, range(3, 8))
        assert same(module, other)
        its_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})


@every
@pytest.mark.parametrize("foreach", [True, False])
def test_tensors_of_every_shape_and_dtype_in_one_group(row: Row, foreach: bool) -> None:
    """Without numbers, of several precisions, not contiguous."""
    shapes = [(0, 4), (4, 0), (0,), (), (8, 8)]
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    kinds = (torch.bfloat16, torch.float16, torch.float64)
    params += [nn.Parameter(torch.ones(8, 8, dtype=dtype)) for dtype in kinds]
    params.append(nn.Parameter(torch.ones(8, 4).mT))
    optimizer = row.kind(params, **{**row.options, "foreach": foreach})
    optimizer.begin_round()
    generator = torch.Generator().manual_seed(0)
    for _ in range(16):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    assert all(torch.isfinite(p).all() and not (p == 1).all() for p in params if p.numel())
    assert not any("exp_avg" in optimizer.state.get(p, {}) for p in params if not p.numel())


@each_class
def test_state_goes_on_in_another_precision(row: Row, problem: Problem) -> None:
    """As with torch's own, a float32 model's state serves its float64 copy."""
    module = problem.module()
    optimizer = row.of(module)
    problem.train(module, optimizer, range(3))
    wide, problem_64 = copy.deepcopy(module).double(), copy.copy(problem)
    problem_64.x = problem.x.double()
    other = row.of(wide)
    other.load_state_dict(saved(optimizer))
    problem.train(module, optimizer, range(3, 6))
    problem_64.train(wide, other, range(3, 6))
    floats = [v for s in other.state.values() for k, v in s.items() if v.is_floating_point() and k != "step"]
    assert {v.dtype for v in floats} == {torch.float64}
    if row.kind not in (ECOSGD, ECOAdamW):  # Whose noise is drawn in another precision.
        for p, q in zip(module.parameters(), wide.parameters(), strict=True):
            torch.testing.assert_close(p.double(), q, rtol=1e-3, atol=1e-4)


@each_class
def test_closures_have_gradients_and_nothing_to_do_does_nothing(row: Row, problem: Problem) -> None:
    module = problem.module()
    optimizer, before = row.of(module), copy.deepcopy(module)
    optimizer.step()
    assert same(before, module)
    with torch.no_grad():
        assert optimizer.step(lambda: float(torch.is_grad_enabled())) == 1.0
    first = optimizer.param_groups[0]["params"][0]
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [first]})


@each_class
def test_groups_have_settings_of_their_own(row: Row, problem: Problem) -> None:
    module = problem.module()
    frozen = [p.detach().clone() for p in module[2].parameters()]
    groups = [
        {"params": list(module[0].parameters())},
        {"params": list(module[2].parameters()), "lr": 0.0},
    ]
    adam = {"adam_lr": 0.0} if issubclass(row.kind, AuON) else {}
    optimizer = row.kind(groups, **{**row.options, **adam})
    before = module[0].weight.detach().clone()
    problem.train(module, optimizer, range(5))
    assert all(torch.equal(a, b) for a, b in zip(frozen, module[2].parameters(), strict=True))
    assert not torch.equal(before, module[0].weight)
    count = len(optimizer.param_groups)
    with pytest.raises(ConfigError, match="lr=-1"):
        optimizer.add_param_group({"params": list(module[4].parameters()), "lr": -1})
    assert len(optimizer.param_groups) == count
    optimizer.add_param_group({"params": list(module[4].parameters())})
    problem.train(module, optimizer, range(5, 8))


@each_class
def test_a_schedule_reaches_every_group(row: Row, problem: Problem) -> None:
    module = problem.module()
    optimizer = row.of(module)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    problem.train(module, optimizer, range(2))
    schedule.step()
    stopped = copy.deepcopy(module)
    problem.train(module, optimizer, range(2, 5))
    assert same(stopped, module)


@each_class
def test_sparse_gradients_are_refused(row: Row) -> None:
    layer = nn.Embedding(5, 3, sparse=True)
    optimizer = row.kind(layer.parameters(), **row.options)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="sparse=False"):
        optimizer.step()


@each_class
def test_complex_parameters_are_refused(row: Row) -> None:
    with pytest.raises(ConfigError, match="complex64"):
        row.kind([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], **row.options)


@each_class
def test_no_parameters_is_an_error_of_torch(row: Row) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        row.kind([], **row.options)


@each_class
def test_named_parameters_are_split_like_others(row: Row, problem: Problem) -> None:
    first, second = problem.module(), problem.module()
    problem.train(first, row.kind(first.parameters(), **row.options), range(4))
    problem.train(second, row.kind(second.named_parameters(), **row.options), range(4))
    assert same(first, second)


@each_class
def test_state_of_another_model_is_refused(row: Row, problem: Problem) -> None:
    module = problem.module()
    optimizer = row.of(module)
    problem.train(module, optimizer, range(2))
    wider = problem.module()
    wider[0] = nn.Linear(13, 16)
    with pytest.raises(ConfigError, match="load the state of the same model"):
        row.of(wider).load_state_dict(saved(optimizer))


WRONG = [
    (AuON, {"momentum": 1.0}, "momentum=1.0"),
    (AuON, {"variant": "papr"}, "Did you mean 'paper'"),
    (AuON, {"scale": "big"}, "unknown scale"),
    (AuON, {"ns_steps": -1}, "ns_steps=-1"),
    (AuON, {"weight_decay": -0.1}, "weight_decay=-0.1"),
    (AuON, {"gamma": float("nan")}, "gamma=nan"),
    (AuON, {"adam_betas": (0.9,)}, "adam_betas"),
    (AuON, {"adam_lr": -1}, "adam_lr=-1"),
    (HybridAuON, {"ns_steps": 0}, "ns_steps=0"),
    (CLASSP, {"power": 0.0}, "power=0.0"),
    (CLASSP, {"threshold": -1e-9}, "threshold=-1e-09"),
    (CLASSP, {"eps": 0.0}, "eps=0.0"),
    (CLASSP, {"density": 0.0}, "density=0.0"),
    (CLASSP, {"density": 0.5, "legacy": True}, "legacy=False"),
    (ECOSGD, {"lr": 0.1, "momentum": 0.0}, "momentum=0.0"),
    (ECOSGD, {"lr": 0.1, "quantizer": "int9"}, "quantizer='int9'"),
    (ECOSGD, {"lr": 0.1, "quantizer": -0.5}, "quantizer=-0.5"),
    (ECOSGD, {"lr": 0.1, "rounding": "up"}, "unknown rounding"),
    (ECOSGD, {"lr": 0.1, "staleness": 1.5}, "staleness=1.5"),
    (ECOSGD, {"lr": 0.1, "block": 0}, "block=0"),
    (ECOAdamW, {"lr": 0.1, "betas": (0.0, 0.9)}, r"betas\[0\]=0"),
    (ECOAdamW, {"lr": 0.1, "seed": -1}, "seed=-1"),
    (FRUGAL, {"density": 1.1}, "density=1.1"),
    (FRUGAL, {"update_gap": 0}, "update_gap=0"),
    (FRUGAL, {"projector": "column"}, "Did you mean 'columns'"),
    (FRUGAL, {"inactive_rule": "sign"}, "Did you mean 'sign_sgd'"),
    (FRUGAL, {"state_full": "adamw"}, "Did you mean 'adam'"),
    (FRUGAL, {"block_order": "up"}, "unknown block_order"),
    (FRUGAL, {"betas": 0.9}, "betas=0.9"),
    (FRUGAL, {"eps": -1.0}, "eps=-1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "words"), WRONG)
def test_impossible_settings_are_refused(kind: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        kind([nn.Parameter(torch.ones(4, 4))], **options)


def test_a_block_that_does_not_divide_a_row_is_an_error() -> None:
    parameter = nn.Parameter(torch.ones(4, 6))
    parameter.grad = torch.ones(4, 6)
    with pytest.raises(ConfigError, match="block=4 does not divide rows of 6"):
        ECOSGD([parameter], lr=0.1, block=4).step()


def test_vectors_are_not_for_matrix_methods() -> None:
    vector = nn.Parameter(torch.ones(4))
    with pytest.raises(ConfigError, match="algo='auon' is for matrices"):
        AuON([{"params": [vector], "algo": "auon"}])
    with pytest.raises(ConfigError, match="is for matrices"):
        FRUGAL([{"params": [vector], "is_proj": True}], projector="rows")
    FRUGAL([{"params": [vector], "is_proj": True}], projector="block")


def test_for_module_leaves_embeddings_and_the_output_layer_alone() -> None:
    module = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    for kind, key, method in ((AuON, "algo", "auon"), (ECOSGD, "eco", True), (FRUGAL, "is_proj", True)):
        groups = kind.for_module(module, lr=0.1).param_groups
        marked = [p for group in groups if group[key] == method for p in group["params"]]
        assert len(marked) == 1
        assert marked[0] is module[1].weight
        assert sum(len(group["params"]) for group in groups) == 7
    alone = nn.Linear(4, 3)  # The only matrix: it is no output layer after others.
    assert FRUGAL.for_module(alone).param_groups[0]["is_proj"]


def test_convolutions_train() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 1, 6, 6), torch.randint(0, 3, (20,))
    for row in ROWS:
        module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        module = module.to(memory_format=torch.channels_last)
        if row.options.get("block"):
            continue
        optimizer, losses = row.of(module), []
        before = module[0].weight.detach().clone()
        for _ in range(8):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0], row
        assert not torch.equal(before, module[0].weight), row
