"""A node process whose clients train as the experiment says that comes with each request."""

from __future__ import annotations

import sys
import tomllib

from flwr.app import Context, Message
from flwr.clientapp import ClientApp


class ExperimentApp(ClientApp):
    """Builds the app of an experiment when it first comes, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.apps: dict[str, ClientApp] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        from turnout.experiment import Experiment
        from turnout.experiment.build import make_app, make_task

        text = str(message.content["config"]["experiment"])
        if text not in self.apps:
            experiment = Experiment.from_dict(tomllib.loads(text))
            self.apps[text] = make_app(experiment, make_task(experiment))
        return self.apps[text](message, context)


def main() -> None:
    from turnout.client.node import parse_clients, run_node

    address, clients, name, state_dir = sys.argv[1:5]
    summary = run_node(address, ExperimentApp(), parse_clients(clients), name=name, state_dir=state_dir)
    print(f'{{"rounds": {summary.rounds}, "sessions": {summary.sessions}}}')


if __name__ == "__main__":
    main()
