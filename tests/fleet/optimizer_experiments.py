"""Experiment files of clients with each optimizer and with each way of handing on its state."""

from __future__ import annotations

CLIENTS = {
    "auon": """
optimizer = "auon"
lr = 0.05
optimizer_state = "send"
""",
    "hybrid-auon": """
optimizer = "hybrid-auon"
lr = 0.05
optimizer_options = { ns_steps = 1 }
""",
    "classp": """
optimizer = "classp"
lr = 0.1
optimizer_state = "keep"
optimizer_options = { threshold = 1e-7 }
""",
    "eco-sgd": """
optimizer = "eco-sgd"
lr = 0.3
optimizer_state = "keep"
optimizer_options = { rounding = "rtn" }
""",
    "eco-adamw": """
optimizer = "eco-adamw"
lr = 0.01
optimizer_state = "send"
optimizer_options = { quantizer = "int4" }
""",
    "frugal": """
optimizer = "frugal"
lr = 0.01
optimizer_state = "send"
optimizer_options = { projector = "columns", update_gap = 4 }
""",
}
"""The ``[client]`` options of each registered optimizer."""

EXPERIMENT = """
[run]
rounds = {rounds}
[task]
name = "digits"
num_clients = 6
min_examples = 1
[client]
batch_size = 16
local_steps = 5
{client}
[participation]
model = "bernoulli"
probabilities = 0.8
"""


_METHOD = """
[run]
rounds = 4
[task]
{task}
num_clients = 6
[client]
{client}
[participation]
model = "bernoulli"
probabilities = 0.8
[strategy]
{strategy}
"""
METHODS = {
    "bo-rep": _METHOD.format(
        task='name = "hyper-representation"\nfeatures = 16',
        client="batch_size = 32",
        strategy='name = "bo-rep"\neta = 2.0\nnu = 0.1',
    ),
    "field-space-continual": _METHOD.format(
        task='name = "permuted"\nwidth = 24\nnum_tasks = 2\nrounds_per_task = 2',
        client="batch_size = 16\nlr = 0.03\nlocal_steps = 8",
        strategy='name = "field-space-continual"\ntotal_rounds = 4\nkl_weight = 0.1\nmoments = "keep"',
    ),
}
"""Experiment files, of four rounds, of the methods that are a strategy and a local update together."""


CODED = {
    "frugal in codes": (
        'optimizer = "frugal"\nlr = 0.01\nreply = "coded"\n'
        'optimizer_options = { projector = "columns", update_gap = 4 }\n[strategy]\nname = "fedstale"'
    ),
    "eco in codes both ways": (
        'optimizer = "eco-sgd"\nlr = 0.3\nreply = "coded"\noptimizer_state = "keep"\n'
        '[strategy]\nname = "eco"\nmomentum = 0.5'
    ),
}
"""``[client]`` options, and a strategy, of clients that reply in codes."""


def experiment(client: str, rounds: int = 4) -> str:
    """Return the experiment file with these client options."""
    return EXPERIMENT.format(client=client, rounds=rounds)
