"""A run's model or adapter as files that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from turnout.experiment.build import make_participation, make_strategy, make_task
from turnout.experiment.model import Experiment
from turnout.server.run_directory import RunDirectory
from turnout.wire import CheckpointError, ConfigError, load_checkpoint

if TYPE_CHECKING:
    from torch import nn

    from turnout.server.schema import RunRow
    from turnout.server.store import RunStore


def export_run(store: RunStore, row: RunRow, folder: Path, *, merged: bool) -> Path:
    """Write what run ``row`` learned into ``folder``, in the form of Hugging Face, and return the folder.

    ``merged`` writes the whole model, adapters merged into its weights; else the adapter alone is written.
    The base is made again as the run made it. Raises `ConfigError` for an adapter of a run without, or a
    folder that has files; `CheckpointError` when nothing is committed yet.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--to {folder} is there already and not empty; choose another folder.")
    experiment = Experiment.from_stored(row.config, row.strategy)
    if experiment.peft is None and not merged:
        raise ConfigError(
            f"run {row.id} has no [peft] section, so there is no adapter; export the model with --merged."
        )
    module = _final_model(store, row, experiment)
    from turnout.peft import Adapted, save_adapter, save_merged
    from turnout.peft.saving import save_model

    if experiment.peft is None:
        folder.mkdir(parents=True, exist_ok=True)
        return save_model(module, folder)
    adapted = Adapted.of(module)
    return save_merged(adapted, folder) if merged else save_adapter(adapted, folder, base_model=row.task)


def _final_model(store: RunStore, row: RunRow, experiment: Experiment) -> nn.Module:
    """Return the model of the newest checkpoint."""
    directory = RunDirectory(store.directory_of(row))
    rounds = [done.round for done in store.rounds(row.id) if done.checkpoint]
    if not rounds:
        raise CheckpointError(f"run {row.id} has no checkpoint yet; export it after its first round.")
    tree = load_checkpoint(directory.checkpoint(max(rounds)))
    task = make_task(experiment)
    participation = make_participation(experiment, task)
    strategy = make_strategy(experiment, task.num_clients, participation, lambda: task)
    strategy.adopt(task.initial_arrays())
    strategy.load_state_dict(tree["strategy"])
    return task.loaded_model(strategy.arrays())
