"""Sentiment of sentences from four domains, with a pretrained encoder: the task of federated fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from turnout.tasks.classification import ClassificationTask, Examples
from turnout.tasks.partition import IntArray, Partitioner
from turnout.tasks.pretrained import minilm
from turnout.tasks.source_archives import VADER
from turnout.tasks.task import ClientData
from turnout.tasks.vader import DOMAINS, RatedSentences, load_vader
from turnout.tasks.validation import check_count
from turnout.wire.errors import unknown_name
from turnout.wire.registry import register

VaderModel = Literal["minilm", "frozen-minilm"]
VaderClients = Literal["domain", "document"]
Holdout = Literal["test", "validation"]

_FORMAT: Final = 1  # Of what is cached.
_CLEAR: Final = 0.5  # A mean rating beyond it says that people agree on the sign.
_HELD_OUT: Final = 0.2
_LONGEST: Final = 512


@register(
    "vader-sentiment", kind="task", summary="Sentiment of tweets, reviews, editorials; MiniLM to fine-tune"
)
class VaderSentiment(ClassificationTask):
    """Positive or negative, for 19,136 human-rated sentences of four domains (Hutto and Gilbert, ICWSM 2014).

    Sentences whose mean rating is beyond 0.5 on a scale from -4 to 4. Inputs are token ids, int32
    (n, tokens), padded with 0. A fifth of each domain's reviews and articles (where it has none: of its
    sentences) is the test set. The server's accuracy and loss are means over the domains.

    num_clients
        Number of clients; the data's own number with ``partition = "natural"``.
    clients
        Who is a natural client: ``"domain"`` (4 silos: tweets, Amazon reviews, film reviews, editorials) or
        ``"document"`` (each Amazon review and each editorial).
    partition
        ``"natural"`` keeps those clients; any other one spreads the sentences whoever they come from.
    model
        ``"minilm"``: the encoder and a linear head, for fine-tuning. ``"frozen-minilm"``: the linear head
        alone, on embeddings that are computed once and kept in the cache.
    tokens
        Length to which sentences are cut; three in a thousand have more than 64.
    train_per_domain, test_per_domain
        Take a seeded random part of so many sentences of each domain; by default all of them.
    holdout
        ``"validation"`` hides the test set: a fifth of the training set is split off in its place, to choose
        settings on.
    data_dir
        A folder with VADER's source archive; by default where ``turnout data fetch`` puts it.
    """

    name = "vader-sentiment"
    classes = 2
    chunk_size = 64

    def __init__(
        self,
        *,
        num_clients: int | None = None,
        clients: VaderClients = "domain",
        partition: str | Partitioner = "natural",
        model: VaderModel = "minilm",
        tokens: int = 64,
        train_per_domain: int | None = None,
        test_per_domain: int | None = None,
        holdout: Holdout = "test",
        data_dir: str | Path | None = None,
        seed: int = 0,
        **partition_options: Any,
    ) -> None:
        for field, value, known in (
            ("model", model, VaderModel),
            ("clients", clients, VaderClients),
            ("holdout", holdout, Holdout),
        ):
            if value not in get_args(known):
                raise unknown_name(field, value, get_args(known))
        check_count("tokens", tokens, low=3)
        self.model_name = model
        self._tokens = min(tokens, _LONGEST)
        sentences = load_vader(data_dir)
        train, test = _split(sentences, clients, holdout, seed)
        train = _part(train, sentences.domains, train_per_domain, "train_per_domain", seed)
        test = _part(test, sentences.domains, test_per_domain, "test_per_domain", seed)
        self._ids = minilm.token_ids(sentences.texts, self._tokens, [VADER.sha256, _FORMAT])
        # Sentences of like length follow each other, so that chunks have little padding.
        test = test[np.lexsort((minilm.lengths(self._ids[test]), sentences.domains[test]))]
        self._test_domains = sentences.domains[test]
        labels = (sentences.ratings > 0).astype(np.int64)
        groups = (sentences.domains if clients == "domain" else sentences.documents)[train]
        if model == "minilm":
            self.target_modules, self.modules_to_save = minilm.TARGETS, ("classifier",)
        super().__init__(
            Examples(self._inputs(train), labels[train]),
            Examples(self._inputs(test), labels[test]),
            num_clients=num_clients,
            partition=partition,
            seed=seed,
            groups=groups,
            partition_options=partition_options,
        )

    def _inputs(self, rows: IntArray) -> np.ndarray[Any, Any]:
        if self.model_name == "minilm":
            return self._ids[rows]
        return minilm.frozen_features(self._ids[rows])

    def model(self) -> nn.Module:
        """Return MiniLM with a new linear head, or the head alone."""
        if self.model_name == "minilm":
            return minilm.SentenceClassifier(self.classes)
        return nn.Linear(minilm.WIDTH, self.classes)

    def features(self, raw: np.ndarray[Any, Any]) -> Tensor:
        """Return token ids, int32 (n, tokens), or embeddings, float32 (n, 384)."""
        return torch.from_numpy(np.ascontiguousarray(raw))

    def evaluate_model(self, model: nn.Module, data: ClientData) -> dict[str, float]:
        """Return loss and accuracy; on the test set means over the domains, and each domain's accuracy."""
        if data is not self._test_data:
            return super().evaluate_model(model, data)
        found: dict[str, dict[str, float]] = {}
        for domain in np.unique(self._test_domains):
            rows = torch.from_numpy(np.flatnonzero(self._test_domains == domain))
            part = ClientData(data.x.index_select(0, rows), data.y.index_select(0, rows))
            found[DOMAINS[domain]] = super().evaluate_model(model, part)
        means = {
            name: float(np.mean([scores[name] for scores in found.values()])) for name in ("loss", "accuracy")
        }
        return means | {f"accuracy_{domain}": scores["accuracy"] for domain, scores in found.items()}


def _split(
    sentences: RatedSentences, clients: VaderClients, holdout: Holdout, seed: int
) -> tuple[IntArray, IntArray]:
    """Return the rows of (train, held out) clear sentences; no document is in both."""
    usable = np.abs(sentences.ratings) > _CLEAR
    if clients == "document":
        usable &= sentences.has_document
    train, test = _hold_out(sentences, np.flatnonzero(usable), np.random.default_rng([seed, 0]))
    if holdout == "validation":
        return _hold_out(sentences, train, np.random.default_rng([seed, 1]))
    return train, test


def _hold_out(
    sentences: RatedSentences, rows: IntArray, rng: np.random.Generator
) -> tuple[IntArray, IntArray]:
    """Split ``rows``: a fifth of the documents of each domain is held out."""
    chosen: list[IntArray] = []
    for domain in np.unique(sentences.domains[rows]):
        documents = np.unique(sentences.documents[rows[sentences.domains[rows] == domain]])
        chosen.append(rng.permutation(documents)[: round(_HELD_OUT * len(documents))])
    held = np.isin(sentences.documents[rows], np.concatenate(chosen))
    return rows[~held], rows[held]


def _part(rows: IntArray, domains: IntArray, count: int | None, field: str, seed: int) -> IntArray:
    """Return ``count`` random rows of each domain (all of a domain that has fewer, or when None)."""
    if count is None:
        return rows
    check_count(field, count, low=1)
    rng = np.random.default_rng([seed, 2])
    kept = [rng.permutation(rows[domains[rows] == domain])[:count] for domain in np.unique(domains[rows])]
    return np.sort(np.concatenate(kept))
