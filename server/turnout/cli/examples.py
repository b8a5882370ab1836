"""What ``--help`` shows as examples; a test parses each."""

from __future__ import annotations

from typing import Final

EXAMPLES: Final[dict[str, tuple[str, ...]]] = {
    "simulate": (
        "turnout simulate examples/digits.toml --set strategy.name=fedau --set run.rounds=50",
        "turnout simulate examples/digits.toml --compare fedavg,fedau,fedstale",
        "turnout simulate --resume last",
    ),
    "server": (
        "turnout server examples/fleet.toml",
        "turnout server examples/fleet.toml --address 0.0.0.0:9091 --certs pki --dashboard 127.0.0.1:8050",
        "turnout server --resume last",
    ),
    "client": (
        "turnout client --server 127.0.0.1:9091 --clients 0-2",
        "turnout client --server fl.example.org:9091 --certs pki --name edge-1 --state-dir state",
        "turnout client --server 127.0.0.1:9091 --app my_module:app --clients 0",
    ),
    "enrol": (
        "turnout enrol --server fl.example.org:9092 --ca ca.pem --name edge-1 --token-file token --dir pki",
    ),
    "edit": ("turnout edit last --rho 0.9,0.95,0.99",),
    "dashboard": (
        "turnout dashboard --open",
        "turnout dashboard --host 0.0.0.0 --token-file token --tls-cert web.pem --tls-key web.key",
    ),
    "export": (
        "turnout export last --to my-model",
        "turnout export last --adapter --to my-adapter",
    ),
    "methods": ("turnout methods --kind strategy",),
    "reproduce": ("turnout reproduce fedau",),
}


def shown(command: str) -> str:
    """Return the examples of ``command`` as the last lines of its help."""
    # Typer joins lines; only an empty one separates.
    return "\n\n".join(("Examples:", *EXAMPLES[command]))
