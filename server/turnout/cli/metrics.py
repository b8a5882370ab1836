"""``--metrics-address`` and its kin: the same for servers and clients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from turnout.cli.output import Output

if TYPE_CHECKING:
    from turnout.wire.metrics_registry import MetricsRegistry

MetricsAddress = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT", envvar="TURNOUT_METRICS_ADDRESS", help="Serve Prometheus metrics at /metrics."
    ),
]
MetricsPort = Annotated[
    int | None,
    typer.Option(
        metavar="PORT",
        envvar="TURNOUT_METRICS_PORT",
        min=0,
        max=65535,
        help="The same as --metrics-address 127.0.0.1:PORT.",
    ),
]
MetricsOpen = Annotated[
    bool,
    typer.Option(
        "--metrics-open",
        envvar="TURNOUT_METRICS_OPEN",
        help="Let other machines read the metrics; there is no password.",
    ),
]


@dataclass(frozen=True)
class MetricsOptions:
    """Where metrics are served, if at all; ``open`` allows an address beyond loopback."""

    address: str | None = None
    port: int | None = None
    open: bool = False

    @property
    def where(self) -> str | None:
        """The address; None for no metrics. Raises `ConfigError` when it is given twice."""
        from turnout.wire import ConfigError

        if self.port is None:
            return self.address
        if self.address is not None:
            raise ConfigError(
                f"--metrics-address {self.address} and --metrics-port {self.port} both say where; give one."
            )
        return f"127.0.0.1:{self.port}"


@contextmanager
def metrics_endpoint(options: MetricsOptions, output: Output) -> Iterator[MetricsRegistry | None]:
    """Serve a new registry while entered, and give it; None when no metrics are wanted.

    Raises `ConfigError`, whose cause is an OSError when the address cannot be listened on.
    """
    where = options.where
    if where is None:
        yield None
        return
    from turnout.wire import ConfigError
    from turnout.wire.address import is_loopback
    from turnout.wire.metrics_endpoint import MetricsServer
    from turnout.wire.metrics_registry import MetricsRegistry

    if not options.open and ":" in where and not is_loopback(where):
        raise ConfigError(
            f"--metrics-address {where} can be reached from other machines; use 127.0.0.1 (and a proxy), or "
            "say --metrics-open to let them read the metrics."
        )
    registry = MetricsRegistry()
    with MetricsServer(where, registry, insecure=options.open) as endpoint:
        output.say(f"metrics at {endpoint.url}", markup=False)
        yield registry
