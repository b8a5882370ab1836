"""A node process of the equality test: digits clients that answer after random pauses."""

from __future__ import annotations

import random
import sys
import time

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable


def app(pause: float) -> ClientApp:
    from turnout.client import client_app
    from turnout.tasks.digits import Digits

    def late(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        reply = call_next(message, context)
        time.sleep(random.uniform(0, pause))
        return reply

    task = Digits(num_clients=8, model="softmax", alpha=0.5, seed=1)
    return client_app(task, lr=0.05, local_steps=2, batch_size=8, seed=5, anchor_batch_size=16, mods=[late])


def main() -> None:
    from turnout.client.node import parse_clients, run_node

    address, clients, name, state_dir = sys.argv[1:5]
    summary = run_node(address, app(0.03), parse_clients(clients), name=name, state_dir=state_dir, workers=4)
    print(f'{{"rounds": {summary.rounds}, "sessions": {summary.sessions}}}')


if __name__ == "__main__":
    main()
