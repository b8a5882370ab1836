"""Writes the Grafana dashboard of a fleet: ``python deploy/grafana/dashboard.py`` (extra ``deploy-test``).

The panels are the table below; tests/deploy/test_grafana.py runs every expression against a real Prometheus.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

OUTPUT = Path(__file__).with_name("turnout.json")
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
# Every series of the dashboard is of the chosen jobs and machines.
WHERE = 'job=~"$job", instance=~"$instance"'
HEIGHT = 8


@dataclass(frozen=True)
class Panel:
    """One panel: queries are (expression, legend); ``%`` stands for the common labels."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    description: str
    single: bool = False
    span: int = 8
    optional: bool = False
    """Shown only by fleets that have it, such as those with GPUs."""


def rate(metric: str, by: str = "") -> str:
    """Return the summed rate of a counter."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{%}}[$__rate_interval]))"


def quantile(q: float, histogram: str, by: str = "") -> str:
    """Return a quantile of a histogram."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({histogram}_bucket{{%}}[$__rate_interval])))"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Run": (
        Panel("Rounds", "short", (("sum(turnout_rounds_total{%})", ""),),
              "Rounds committed since the server started.", single=True, span=4),
        Panel("Clients connected", "short", (("sum(turnout_clients_connected{%})", ""),),
              "Clients that have a stream now.", single=True, span=4),
        Panel("Since the last commit", "s", (("time() - max(turnout_last_commit_timestamp_seconds{%})", ""),),
              "Grows while no round is committed.", single=True, span=4),
        Panel("Last loss", "none", (("turnout_run_loss{%}", "{{run}}"),),
              "Of the live run, on held-out data where the server has some, else in training.",
              single=True, span=4),
        Panel("Quorum missed", "short", (("sum(turnout_quorum_missed_total{%})", ""),),
              "Rounds with fewer good replies than the quorum.", single=True, span=4),
        Panel("First certificate expires in", "s",
              (("min(turnout_certificate_expiry_timestamp_seconds{%}) - time()", ""),),
              "Of all certificates that the scraped processes use.", single=True, span=4),
        Panel("Loss", "none", (("turnout_run_loss{%}", "{{run}}"),),
              "The last round's, of the live run.", span=12),
        Panel("Rounds per minute", "short", (("60 * " + rate("turnout_rounds_total"), "rounds"),),
              "Committed rounds.", span=12),
    ),
    "Rounds": (
        Panel("Round duration", "s",
              ((quantile(0.5, "turnout_round_seconds"), "median"),
               (quantile(0.95, "turnout_round_seconds"), "95 %")), "From one commit to the next."),
        Panel("Phases of a round", "s",
              (("sum by (phase) (rate(turnout_round_phase_seconds_sum{%}[$__rate_interval]))"
                " / sum by (phase) (rate(turnout_round_phase_seconds_count{%}[$__rate_interval]))",
                "{{phase}}"),), "Mean; training includes waiting for clients and folding."),
        Panel("Checkpoints", "s",
              ((quantile(0.5, "turnout_checkpoint_seconds"), "median"),
               (quantile(0.95, "turnout_checkpoint_seconds"), "95 %")),
              "Writing one and syncing it to disk; each round waits for its own."),
    ),
    "Clients": (
        Panel("Connected, registered, quarantined", "short",
              (("sum(turnout_clients_connected{%})", "connected"),
               ("sum(turnout_clients_registered{%})", "registered"),
               ("sum(turnout_clients_quarantined{%})", "quarantined")), "As the server knows them."),
        Panel("Invitations by outcome", "short",
              ((rate("turnout_client_replies_total", "outcome"), "{{outcome}}"),),
              "Per second."),
        Panel("Time of a reply", "s",
              ((quantile(0.5, "turnout_client_reply_seconds"), "median"),
               (quantile(0.95, "turnout_client_reply_seconds"), "95 %")),
              "As clients measure it. Exemplars name the slowest client of a round."),
        Panel("Staleness", "short",
              ((quantile(0.5, "turnout_client_staleness_rounds"), "median of replies"),
               ("max(turnout_client_staleness_rounds_max{%})", "longest absence")),
              "Rounds since a client took part before."),
        Panel("Weight over mean weight", "short",
              ((quantile(0.05, "turnout_client_weight_ratio"), "5 %"),
               (quantile(0.95, "turnout_client_weight_ratio"), "95 %")),
              "Far from 1: some clients count for more than others."),
        Panel("Samples per second", "short",
              ((quantile(0.5, "turnout_client_samples_per_second"), "median"),),
              "Examples that a client trains on per second."),
    ),
    "Traffic and memory": (
        Panel("Arrays", "Bps",
              ((rate("turnout_received_bytes_total"), "received"),
               (rate("turnout_sent_bytes_total"), "sent")),
              "Bytes of arrays at the server."),
        Panel("Upload slots", "short", (("sum by (state) (turnout_upload_slots{%})", "{{state}}"),),
              "Waiting replies mean that there are too few."),
        Panel("Memory", "bytes", (("turnout_memory_bytes{%}", "{{instance}} {{kind}}"),),
              "Of the processes, and of the strategy's state."),
    ),
    "Nodes that are scraped themselves": (
        Panel("Tasks by outcome", "short", ((rate("turnout_node_tasks_total", "outcome"), "{{outcome}}"),),
              "Per second."),
        Panel("Training time", "s",
              ((quantile(0.5, "turnout_node_train_seconds", "instance"), "{{instance}}"),), "Median."),
        Panel("Traffic of nodes", "Bps",
              ((rate("turnout_node_sent_bytes_total", "instance"), "{{instance}} sent"),
               (rate("turnout_node_received_bytes_total", "instance"), "{{instance}} received")),
              "Messages."),
        Panel("GPU utilization", "percentunit", (("turnout_node_gpu_utilization_ratio{%}", "{{instance}}"),),
              "Empty without GPUs.", span=12, optional=True),
        Panel("GPU memory", "bytes", (("turnout_node_gpu_device_memory_bytes{%}", "{{instance}}"),),
              "In use on the devices by anyone; empty without GPUs.", span=12, optional=True),
    ),
}  # fmt: skip


def expressions(*, optional: bool = False) -> list[str]:
    """Return every expression as Grafana would send it, variables included."""
    return [
        expression.replace("%}", WHERE + "}")
        for panels in ROWS.values()
        for panel in panels
        if optional or not panel.optional
        for expression, _ in panel.queries
    ]


def render() -> str:
    """Return the dashboard as JSON."""
    board = (
        dashboard.Dashboard("Turnout fleet")
        .uid("turnout-fleet")
        .tags(["turnout", "federated learning"])
        .refresh("15s")
        .time("now-1h", "now")
        .readonly()
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_choice("job", "label_values(turnout_build_info, job)"))
        .with_variable(_choice("instance", 'label_values(turnout_build_info{job=~"$job"}, instance)'))
    )
    number = 0
    for title, panels in ROWS.items():
        number += 1
        board = board.with_row(dashboard.Row(title).id(number))
        for panel in panels:
            number += 1
            board = board.with_panel(_panel(panel, number))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def _choice(name: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .datasource(SOURCE)
        .query(query)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def _panel(panel: Panel, number: int) -> stat.Panel | timeseries.Panel:
    made: stat.Panel | timeseries.Panel = timeseries.Panel()
    if panel.single:
        made = stat.Panel().reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    made = made.id(number).title(panel.title).description(panel.description).unit(panel.unit)
    made = made.datasource(SOURCE).span(panel.span).height(HEIGHT // 2 if panel.single else HEIGHT)
    for at, (expression, legend) in enumerate(panel.queries):
        query = prometheus.Dataquery().expr(expression.replace("%}", WHERE + "}")).ref_id(chr(ord("A") + at))
        made = made.with_target(query.legend_format(legend).exemplar(not panel.single))
    return made


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(OUTPUT.read_text(encoding="utf-8") != render())
    OUTPUT.write_text(render(), encoding="utf-8")
