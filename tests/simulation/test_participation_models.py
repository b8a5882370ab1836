from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from turnout.simulation import Always, Bernoulli, Cyclic, Markov, ParticipationModel, Sampled, Trace
from turnout.wire import ConfigError, methods

P = [0.02, 0.1, 0.5, 0.9, 1.0]

MODELS: dict[str, Callable[[int], ParticipationModel]] = {
    "always": lambda seed: Always(5),
    "bernoulli": lambda seed: Bernoulli(P, seed=seed),
    "markov": lambda seed: Markov(P, a_max=0.3, seed=seed),
    "cyclic": lambda seed: Cyclic(P, cycle=50, seed=seed),
    "sampled": lambda seed: Sampled(5, 2, seed=seed),
    "trace": lambda seed: Trace(np.random.default_rng(seed).random((40, 5)) < 0.5),
}
RANDOM = ["bernoulli", "markov", "cyclic", "sampled"]
PAPERS = dict.fromkeys(["bernoulli", "markov", "cyclic"], "2306.03401") | {"sampled": "1602.05629"}


def history(model: ParticipationModel, rounds: int) -> np.ndarray:
    return np.stack([model.mask(r) for r in range(1, rounds + 1)])


@pytest.mark.parametrize("name", MODELS)
class TestEveryModel:
    def test_is_a_pure_function_of_the_round(self, name: str) -> None:
        forward, other = MODELS[name](3), MODELS[name](3)
        expected = history(forward, 200)
        for server_round in [7, 3, 200, 64, 63, 65, 1, 129, 128, 3]:
            assert np.array_equal(other.mask(server_round), expected[server_round - 1])
        assert np.array_equal(history(forward, 200), expected)

    def test_masks_are_read_only_vectors_over_all_clients(self, name: str) -> None:
        model = MODELS[name](0)
        mask = model.mask(1)
        assert (model.num_clients, mask.shape, mask.dtype) == (5, (5,), np.dtype(bool))
        with pytest.raises(ValueError, match="read-only"):
            mask[0] = True

    def test_rates_are_the_long_run_frequencies(self, name: str) -> None:
        model = MODELS[name](1)
        # 40 equal blocks give each client's standard error, whatever the correlation between rounds.
        blocks = history(model, 8000).reshape(40, 200, 5).mean(axis=1)
        error = np.maximum(blocks.std(axis=0, ddof=1) / np.sqrt(40), 1e-4)
        assert np.all(np.abs(blocks.mean(axis=0) - model.rates) < 4 * error + 0.004)

    def test_those_present_are_the_mask_as_a_list(self, name: str) -> None:
        listed, masked = MODELS[name](4), MODELS[name](4)
        for server_round in [5, 1, 90, 2, 3]:
            present = listed.present(server_round)
            assert present.dtype == np.int64
            assert np.array_equal(present, np.flatnonzero(masked.mask(server_round)))

    def test_round_zero_is_refused(self, name: str) -> None:
        for ask in (MODELS[name](0).mask, MODELS[name](0).present):
            with pytest.raises(ConfigError, match="server_round is 0, but rounds are counted from 1"):
                ask(0)

    def test_is_registered(self, name: str) -> None:
        entry = next(entry for entry in methods("participation") if entry.slug == name)
        assert entry.paper == PAPERS.get(name)
        assert isinstance(MODELS[name](0), entry.target)


@pytest.mark.parametrize("name", RANDOM)
def test_seeds_differ(name: str) -> None:
    assert not np.array_equal(history(MODELS[name](1), 100), history(MODELS[name](2), 100))


def test_always_is_always() -> None:
    assert history(MODELS["always"](0), 10).all()


def test_bernoulli_rounds_and_clients_are_independent() -> None:
    masks = history(Bernoulli([0.4] * 3, seed=5), 6000).astype(float)
    between_clients = np.corrcoef(masks.T) - np.eye(3)
    between_rounds = [np.corrcoef(masks[:-1, i], masks[1:, i])[0, 1] for i in range(3)]
    assert np.abs(between_clients).max() < 0.05
    assert np.abs(between_rounds).max() < 0.05


def test_bernoulli_long_run_rate_over_many_clients() -> None:
    masks = history(Bernoulli(np.full(2000, 0.1), seed=0), 200)
    assert masks.mean() == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / masks.size))


@pytest.mark.parametrize(
    ("p", "a_max", "turn_on", "turn_off"),
    [
        (0.5, 0.05, 0.05, 0.05),
        (0.1, 0.05, 0.05, 0.45),
        (1.0, 0.05, 0.05, 0.0),
        # 0.05 (1/0.02 - 1) = 2.45 exceeds 1: it becomes 1 and 0.05 is divided by it.
        (0.02, 0.05, 0.05 / 2.45, 1.0),
    ],
)
def test_markov_transition_rates(p: float, a_max: float, turn_on: float, turn_off: float) -> None:
    model = Markov([p] * 400, a_max=a_max, seed=2)
    assert model.turn_on[0] == pytest.approx(turn_on)
    assert model.turn_off[0] == pytest.approx(turn_off)
    assert model.turn_on[0] / (model.turn_on[0] + model.turn_off[0]) == pytest.approx(p)
    masks = history(model, 400)
    before, after = masks[:-1], masks[1:]
    for state, rate in ((False, turn_on), (True, turn_off)):
        moved = (after != state)[before == state]
        if moved.size:
            assert moved.mean() == pytest.approx(rate, abs=4 * np.sqrt(0.25 / moved.size) + 1e-12)


def test_markov_starts_stationary() -> None:
    first = Markov(np.full(20_000, 0.3), seed=4).mask(1)
    assert first.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / 20_000))


def test_markov_far_round_asked_first_equals_step_by_step() -> None:
    jumped, stepped = Markov([0.3] * 20, seed=9), Markov([0.3] * 20, seed=9)
    late = jumped.mask(1000)
    assert np.array_equal(late, history(stepped, 1000)[-1])
    assert np.array_equal(jumped.mask(500), stepped.mask(500))


def test_sampled_is_a_cohort_of_fixed_size_with_every_client_as_likely() -> None:
    model = Sampled(40, 8, seed=6)
    masks = history(model, 3000)
    assert (masks.sum(axis=1) == 8).all()
    assert np.array_equal(model.rates, np.full(40, 0.2))
    assert np.abs(masks.mean(axis=0) - 0.2).max() < 4.5 * np.sqrt(0.16 / 3000)
    # Without replacement: two clients are together in a round slightly less often than if independent.
    together = (masks[:, 0] & masks[:, 1:].T).mean(axis=1)
    assert together.mean() == pytest.approx(8 * 7 / (40 * 39), abs=0.003)
    assert Sampled(3, 3).mask(1).all()


def test_sampled_costs_its_cohort_not_all_clients() -> None:
    tracemalloc.start()
    try:
        model = Sampled(100_000_000, 100, seed=1)
        cohorts = {tuple(model.present(server_round).tolist()) for server_round in range(1, 20)}
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {len(set(cohort)) for cohort in cohorts} == {100}
    assert len(cohorts) == 19
    assert peak < 1_000_000


@pytest.mark.parametrize("p", [0.004, 0.1, 0.335, 0.5, 0.99, 1.0])
def test_cyclic_is_on_for_exactly_its_rounds_in_every_cycle(p: float) -> None:
    model = Cyclic([p] * 300, cycle=100, seed=1)
    on = max(1, round(100 * p))
    off = max(1, 100 - on)
    masks = history(model, 4 * (on + off))
    for start in range(0, 3 * (on + off), 17):
        assert (masks[start : start + on + off].sum(axis=0) == on).all()
    # On in one piece: it comes on once per cycle. It starts off, except with an offset of 0.
    offsets = masks.argmax(axis=0)
    assert (np.diff(masks[: on + off].astype(int), axis=0, prepend=0) == 1).sum() == 300
    assert offsets.min() >= 0
    assert offsets.max() < off
    if off > 20:
        assert len(np.unique(offsets)) > off / 4
    assert np.array_equal(model.rates, np.full(300, on / (on + off)))


@pytest.mark.parametrize("model", [Bernoulli, Markov, Cyclic])
def test_zero_must_be_meant(model: type[Bernoulli] | type[Markov] | type[Cyclic]) -> None:
    with pytest.raises(ConfigError, match=r"client 1 has p=0.*allow_zero=True"):
        model([0.5, 0.0, 0.5])
    masks = history(model([0.5, 0.0, 0.5], allow_zero=True), 300)
    assert not masks[:, 1].any()
    assert masks[:, 0].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Always(0), r"num_clients .* at least 1, got 0"),
        (lambda: Bernoulli([0.5, 1.5]), r"client 1 has p=1\.5"),
        (lambda: Bernoulli([float("nan")]), r"client 0 has p=nan"),
        (lambda: Bernoulli([0.5], seed=-1), r"seed .* got -1"),
        (lambda: Bernoulli([0.5], seed=True), r"seed .* got True"),
        (lambda: Markov([0.5], a_max=0), r"a_max.* got 0"),
        (lambda: Markov([0.5], a_max=1.5), r"a_max.* got 1\.5"),
        (lambda: Markov([0.5], a_max=float("nan")), r"a_max.* got nan"),
        (lambda: Sampled(5, 6), r"clients_per_round=6, but there are num_clients=5 clients; lower it"),
        (lambda: Sampled(5, 0), r"clients_per_round must be an integer of at least 1, got 0"),
        (lambda: Sampled(5, True), r"clients_per_round .* got True"),
        (lambda: Sampled(0, 1), r"num_clients .* got 0"),
        (lambda: Sampled(5, 1, seed=-1), r"seed .* got -1"),
        (lambda: Cyclic([0.5], cycle=1), r"cycle.* at least 2 .* got 1"),
        (lambda: Cyclic([0.5], cycle=2.5), r"cycle.* got 2\.5"),  # type: ignore[arg-type]
    ],
)
def test_impossible_settings_name_value_and_fix(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
