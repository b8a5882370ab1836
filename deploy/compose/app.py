"""The clients' app of docker-compose.yml: handwritten digits, unevenly shared out over three clients.

    turnout client --server HOST:PORT --app app:app --clients 0
    python app.py FILE    # writes the model that the run starts from

Put your own Flower ClientApp here; the server needs its first model and nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

from turnout.client import client_app
from turnout.tasks import Digits
from turnout.wire.model_file import model_bytes

TASK = Digits(num_clients=3, partition="label-mix", alpha=0.5, min_examples=1)

app = client_app(TASK, lr=0.05, batch_size=16, local_steps=5)

if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(model_bytes(TASK.initial_arrays()))
