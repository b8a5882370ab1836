"""The node: a long-lived process that works for a fleet server."""

from __future__ import annotations

from turnout.client.node.node import Node, NodeSummary, NodeUnreachable, run_node
from turnout.client.node.options import ClientTls, NodeOptions, parse_clients
from turnout.client.node.session import NodeRefused
from turnout.client.node.watch import NodeWatch

__all__ = [
    "ClientTls",
    "Node",
    "NodeOptions",
    "NodeRefused",
    "NodeSummary",
    "NodeUnreachable",
    "NodeWatch",
    "parse_clients",
    "run_node",
]
