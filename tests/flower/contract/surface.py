"""Everything of Flower that Turnout touches: modules, names, and the parameters it passes or overrides."""

from __future__ import annotations

from typing import Final

PUBLIC: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "flwr.app": {
        "Array": ("dtype", "shape", "stype", "data", "ndarray"),
        "ArrayRecord": ("numpy_ndarrays", "torch_state_dict", "array_dict"),
        "ConfigRecord": ("config_dict",),
        "Context": ("run_id", "node_id", "node_config", "state", "run_config"),
        "Error": ("code", "reason"),
        "Message": ("dst_node_id", "message_type", "ttl", "group_id", "reply_to"),
        "MessageType": (),
        "Metadata": (
            "run_id", "message_id", "src_node_id", "dst_node_id", "reply_to_message_id", "group_id",
            "created_at", "ttl", "message_type",
        ),
        "MetricRecord": ("metric_dict",),
        "RecordDict": ("records",),
    },
    "flwr.app.user_config": {"UserConfigValue": ()},
    "flwr.clientapp": {"ClientApp": ("client_fn", "mods"), "mod": ()},
    "flwr.clientapp.mod": {
        "LocalDpMod": ("clipping_norm", "sensitivity", "epsilon", "delta"),
        "adaptiveclipping_mod": ("msg", "ctxt", "call_next"),
        "fixedclipping_mod": ("msg", "ctxt", "call_next"),
    },
    "flwr.clientapp.typing": {"ClientAppCallable": (), "Mod": ()},
    "flwr.serverapp": {"Grid": (), "ServerApp": (), "strategy": ()},
    "flwr.serverapp.strategy": {
        "Strategy": (),
        "Result": (
            "arrays", "train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp",
        ),
    },
}  # fmt: skip
PRIVATE: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "flwr.common.constant": {"ErrorCode": ()},
    "flwr.proto.node_pb2": {"NodeInfo": ()},
    "flwr.supercore.run": {"Run": ("run_id",)},
    "flwr.supercore.task_identity": {"TaskIdentity": ()},
}
"""Met in ``turnout.wire.flower`` only."""

METHODS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "flwr.serverapp.Grid": {
        "create_message": ("content", "message_type", "dst_node_id", "group_id", "ttl"),
        "get_node_ids": (),
        "pull_messages": ("message_ids",),
        "push_messages": ("messages",),
        "send_and_receive": ("messages", "timeout"),
        "set_run": ("run",),
    },
    "flwr.serverapp.strategy.Strategy": {
        "aggregate_evaluate": ("server_round", "replies"),
        "aggregate_train": ("server_round", "replies"),
        "configure_evaluate": ("server_round", "arrays", "config", "grid"),
        "configure_train": ("server_round", "arrays", "config", "grid"),
        "start": (
            "grid", "initial_arrays", "num_rounds", "timeout", "train_config", "evaluate_config",
            "evaluate_fn",
        ),
        "summary": (),
    },
    "flwr.clientapp.ClientApp": {
        "__call__": ("message", "context"),
        "evaluate": ("action",),
        "query": ("action",),
        "train": ("action",),
    },
    "flwr.app.ArrayRecord": {"to_numpy_ndarrays": ("keep_input",), "to_torch_state_dict": (), "items": ()},
    "flwr.app.Array": {"numpy": (), "deflate": ()},
    "flwr.app.Message": {"has_content": (), "has_error": ()},
    "flwr.supercore.run.Run": {"create_empty": ("run_id",)},
}  # fmt: skip
"""Called, or overridden, with these parameters in this order."""

ABSTRACT: Final[dict[str, tuple[str, ...]]] = {
    "flwr.serverapp.Grid": (
        "create_message", "get_node_ids", "pull_messages", "push_messages", "run", "send_and_receive",
        "set_run",
    ),
    "flwr.serverapp.strategy.Strategy": (
        "aggregate_evaluate", "aggregate_train", "configure_evaluate", "configure_train", "summary",
    ),
}  # fmt: skip
"""All that our grids and strategies must implement: a further one would break them."""

_SAMPLING: Final = (
    "fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes",
)  # fmt: skip
_FEDOPT: Final = (*_SAMPLING, "eta", "eta_l", "beta_1", "beta_2", "tau")
_DP: Final = ("strategy", "noise_multiplier", "num_sampled_clients")
_ADAPTIVE: Final = (
    *_DP,
    "initial_clipping_norm",
    "target_clipped_quantile",
    "clip_norm_lr",
    "clipped_count_stddev",
)
STRATEGIES: Final[dict[str, tuple[str, ...]]] = {
    "FedAvg": _SAMPLING,
    "FedAdam": _FEDOPT,
    "FedYogi": _FEDOPT,
    "FedAdagrad": (*_SAMPLING, "eta", "eta_l", "tau"),
    "FedAvgM": (*_SAMPLING, "server_learning_rate", "server_momentum"),
    "FedProx": (*_SAMPLING, "proximal_mu"),
    "FedMedian": _SAMPLING,
    "FedTrimmedAvg": (*_SAMPLING, "beta"),
    "Krum": (*_SAMPLING, "num_malicious_nodes"),
    "MultiKrum": (*_SAMPLING, "num_malicious_nodes", "num_nodes_to_select"),
    "Bulyan": (*_SAMPLING, "num_malicious_nodes"),
    "QFedAvg": (*_SAMPLING, "client_learning_rate", "q"),
    "DifferentialPrivacyServerSideFixedClipping": (*_DP, "clipping_norm"),
    "DifferentialPrivacyServerSideAdaptiveClipping": _ADAPTIVE,
    "DifferentialPrivacyClientSideFixedClipping": (*_DP, "clipping_norm"),
    "DifferentialPrivacyClientSideAdaptiveClipping": _ADAPTIVE,
}
"""The stock strategies that an experiment can name, with their options."""
