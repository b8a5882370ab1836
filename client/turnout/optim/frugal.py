"""FRUGAL: optimizer state for a part of the weights only, a state-free rule for the rest (arXiv 2411.07837).

The gradient of a matrix is split: its projection onto a subspace of share ``density`` gets Adam (or Lion, or
momentum SGD), the residual signSGD (or SGD). The subspace changes every ``update_gap`` steps:

    W = W (1 - lr wd) + lift(-lr s Adam(P(G))) - lr s c sign(G - lift(P(G)))

so that, unlike with low-rank methods, the update has full rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final, Literal

import numpy as np
import torch
from flwr.app import Array
from torch import Tensor

from turnout.optim.adam import check_betas
from turnout.optim.base import Group, ModuleOptimizer, StatePolicy, gradient_of, in_turn, zeros_for
from turnout.optim.state_full import RULES, fresh_state, state_full_step
from turnout.optim.subspaces import (
    Basis,
    BlockOrder,
    Coordinates,
    Projector,
    Subspace,
    active_tensors,
    choose,
    restored,
)
from turnout.optim.whole_steps import require_whole_steps, step_counts
from turnout.tasks.validation import check_count, check_number
from turnout.wire.arrays import NDArray
from turnout.wire.errors import ConfigError, unknown_name
from turnout.wire.registry import register
from turnout.wire.step_counts import matrix_shape

_WINDOW: Final = "window"
_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "projector": ("block", "columns", "rows", "randk", "galore"),
    "inactive_rule": ("sign_sgd", "sgd", "no"),
    "block_order": ("random", "ascending", "descending", "mirror"),
    "galore_basis": ("svd", "random"),
    "state_full": tuple(RULES),
}


@register("frugal", kind="optimizer", paper="2411.07837")
class FRUGAL(ModuleOptimizer):
    """State for a share of each matrix, sign steps for the rest (FRUGAL).

    Matrices are projected, other parameters get the state-full rule (for `for_module`, embeddings and the
    output layer too). A group may say with ``is_proj=True`` or ``False``. Tensors of more than two dimensions
    are matrices of their first dimension by the rest.

    Parameters
    ----------
    params
        Parameters, or groups with settings of their own.
    lr
        Learning rate.
    betas, eps
        Adam's; Lion uses both betas, momentum SGD the first.
    weight_decay
        Decoupled, on all weights.
    density
        rho, the share with state: of the number of tensors for "block", else of each matrix.
    update_gap
        T, steps from one choice of subspace to the next.
    projector
        "block" (whole tensors), "columns", "rows", "randk" (single entries) or "galore" (a basis).
    inactive_rule
        What the rest gets: "sign_sgd", "sgd" or "no" (nothing).
    inactive_lr_scale
        c, the learning rate of the rest in units of lr; 0.1 suits fine-tuning and noisy batches.
    proj_lr_scale
        s, the learning rate of projected tensors in units of lr.
    reset_statistics
        Start state anew with each subspace. Without, what stays active keeps its state.
    block_order
        The order in which "block" goes through the tensors.
    galore_basis
        "svd" (leading singular vectors of the gradient) or "random".
    state_full
        "adam", "lion" or "sgdm".
    seed
        Seeds the choice of subspaces, which depends on it and on the number of steps only.
    foreach
        One kernel for all tensors of a group where that is possible; None decides by device.
    """

    split_key: ClassVar[tuple[str, Any, Any]] = ("is_proj", True, False)
    group_state: ClassVar[tuple[str, ...]] = ("steps",)
    carried: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    own: ClassVar[tuple[str, ...]] = ("_begun",)
    seeding: ClassVar[Literal["round"]] = "round"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        density: float = 0.25,
        update_gap: int = 200,
        projector: Projector = "block",
        inactive_rule: Literal["sign_sgd", "sgd", "no"] = "sign_sgd",
        inactive_lr_scale: float = 1.0,
        proj_lr_scale: float = 1.0,
        reset_statistics: bool = True,
        block_order: BlockOrder = "random",
        galore_basis: Basis = "svd",
        state_full: Literal["adam", "lion", "sgdm"] = "adam",
        seed: int = 0,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "density": density,
            "update_gap": update_gap,
            "projector": projector,
            "inactive_rule": inactive_rule,
            "inactive_lr_scale": inactive_lr_scale,
            "proj_lr_scale": proj_lr_scale,
            "reset_statistics": reset_statistics,
            "block_order": block_order,
            "galore_basis": galore_basis,
            "state_full": state_full,
            "seed": seed,
            "foreach": foreach,
            "steps": 0,
        }
        super().__init__(params, defaults)
        self._begun = [(0, _inactive_lr(group)) for group in self.param_groups]

    # --- groups and rounds -----------------------------------------------------------------------------

    @classmethod
    def carried_state(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the moments that the state-full rule has."""
        return RULES.get(options.get("state_full", "adam"), cls.carried)

    @classmethod
    def advise(cls, policy: StatePolicy, options: Mapping[str, Any], local_steps: int | None) -> str | None:
        """Check that windows and rounds go together, and that clients can agree on the subspaces."""
        gap = options.get("update_gap", 200)
        if policy == "send":
            if options.get("projector") == "galore" and options.get("galore_basis", "svd") == "svd":
                raise ConfigError(
                    "optimizer_state='send' with galore_basis='svd': each client's basis is its own, so that "
                    "the mean of their moments means nothing; use galore_basis='random', or 'reset'."
                )
            if local_steps is None:
                raise ConfigError(
                    "optimizer_state='send' needs all clients in the same window of the same subspace, but "
                    "they take different numbers of steps; set local_steps instead of local_epochs."
                )
        if policy == "reset" and local_steps is not None and gap < local_steps and local_steps % gap:
            return (
                f"optimizer_state='reset' cuts the last window short: local_steps={local_steps} is no "
                f"multiple of update_gap={gap}; make it one."
            )
        return None

    def check_group(self, group: Group) -> None:
        """Check the hyperparameters."""
        super().check_group(group)
        check_betas("betas", group["betas"])
        for field in ("eps", "weight_decay", "inactive_lr_scale", "proj_lr_scale"):
            check_number(field, group[field], low=0)
        check_number("density", group["density"], low=0, high=1)
        check_count("update_gap", group["update_gap"], low=1)
        check_count("seed", group["seed"], low=0)
        for field, known in _CHOICES.items():
            if group[field] not in known:
                raise unknown_name(field, str(group[field]), known)
        if group["is_proj"] and group["projector"] != "block" and any(p.dim() < 2 for p in group["params"]):
            raise ConfigError(
                f"projector={group['projector']!r} is for matrices, but the group has a parameter of fewer "
                "than two dimensions; put it into a group with is_proj=False, or use projector='block'."
            )

    def check_state(self, parameter: Tensor, state: Mapping[str, Any]) -> None:
        """Raise `ConfigError` when ``state`` cannot be that of ``parameter``."""
        group = self._group_of(parameter)
        if not group["is_proj"] or group["projector"] == "block":
            super().check_state(parameter, state)
        elif "exp_avg" in state:
            matrix = torch.empty(matrix_shape(parameter.shape), device="meta")
            known = {k: v.to("meta") for k, v in state.items() if k in ("index", "basis")}
            try:
                fits = restored(group["projector"], known, matrix.shape).project(matrix).shape
            except (KeyError, RuntimeError):
                fits = torch.Size()
            if fits != state["exp_avg"].shape:
                raise ConfigError(
                    f"state 'exp_avg' has shape {tuple(state['exp_avg'].shape)}, but the subspace with it "
                    f"gives a parameter of shape {tuple(parameter.shape)} another one; load the state of "
                    "the same model, groups and projector."
                )

    # --- steps -----------------------------------------------------------------------------------------

    def update(self, group: Group, params: list[Tensor]) -> None:
        """Take one step; the step counts, and may change the subspaces, even without any gradient."""
        if group["weight_decay"]:
            for p in params:
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
        window = group["steps"] // group["update_gap"]
        if not group["is_proj"]:
            self._state_full(group, params, group["lr"])
        elif group["projector"] == "block":
            self._blocks(group, params, window)
        else:
            for p in params:
                self._projected(group, p, window)
        group["steps"] += 1

    def _state_full(self, group: Group, params: list[Tensor], lr: float) -> None:
        for some in in_turn(params, group["foreach"]):
            gradients = [gradient_of(p) for p in some]
            for p, g in zip(some, gradients, strict=True):
                if "exp_avg" not in self.state[p]:
                    self.state[p] |= fresh_state(group["state_full"], g)
            state_full_step(group, some, gradients, [self.state[p] for p in some], lr)

    def _blocks(self, group: Group, params: list[Tensor], window: int) -> None:
        """Step with whole tensors active or not."""
        chosen = self._active(group, window)
        active = [p for p in params if p in chosen]
        for p in params:
            state = self.state[p]
            if int(state.get(_WINDOW, -1)) != window:
                anew = group["reset_statistics"] or p not in chosen
                self.state[p] = {**({} if anew else state), _WINDOW: torch.tensor(window)}
        self._state_full(group, active, group["lr"] * group["proj_lr_scale"])
        rest = [p for p in params if p not in chosen]
        for some in in_turn(rest, group["foreach"]):
            steps = [gradient_of(p) for p in some]
            if group["inactive_rule"] == "no":
                continue
            if group["inactive_rule"] == "sign_sgd":
                steps = list(torch._foreach_sign(steps))
            torch._foreach_add_(
                some, [s.to(p.dtype) for s, p in zip(steps, some, strict=True)], alpha=-_inactive_lr(group)
            )

    def _active(self, group: Group, window: int) -> set[Tensor]:
        """Return the group's active tensors of a window."""
        tensors = group["params"]
        numbers = active_tensors(len(tensors), group["density"], group["block_order"], group["seed"], window)
        return {tensors[i] for i in numbers}

    def _projected(self, group: Group, p: Tensor, window: int) -> None:
        """Step with a part of the matrix active."""
        G = gradient_of(p).reshape(matrix_shape(p.shape)).contiguous()
        subspace = self._subspace(group, p, G, window)
        matrix = p.reshape(G.shape).contiguous()  # A copy, perhaps.
        lr = group["lr"] * group["proj_lr_scale"]
        coordinates = subspace.project(G)
        if isinstance(subspace, Coordinates):
            target = subspace.project(matrix)  # In the weights themselves, for the bits of Adam.
            state_full_step(group, [target], [coordinates], [self.state[p]], lr)
        else:
            target = torch.zeros_like(coordinates)
            state_full_step(group, [target], [coordinates], [self.state[p]], lr)
        if group["inactive_rule"] != "no":
            rest = subspace.clear(G.clone())
            if group["inactive_rule"] == "sign_sgd":
                rest = rest.sign_()
            matrix = matrix.add_(rest.to(p.dtype), alpha=-_inactive_lr(group))
        if isinstance(subspace, Coordinates):
            subspace.put(target.to(p.dtype), matrix)
        else:
            matrix.add_(subspace.lift(target, G.shape).to(p.dtype))
        if matrix.data_ptr() != p.data_ptr():
            p.copy_(matrix.view(p.shape))

    def _subspace(self, group: Group, p: Tensor, G: Tensor, window: int) -> Subspace:
        """Return the window's subspace of a tensor; a new one starts its state anew, or moves it over."""
        state = self.state[p]
        if int(state.get(_WINDOW, -1)) == window:
            return restored(group["projector"], state, G.shape)
        subspace = self._chosen(group, p, G, window)
        fresh = fresh_state(group["state_full"], subspace.project(G))
        if "exp_avg" in state and not group["reset_statistics"]:
            old = restored(group["projector"], state, G.shape)
            for key in RULES[group["state_full"]]:
                # GaLore leaves its moments as they are when the basis turns.
                moved = state[key]
                if isinstance(subspace, Coordinates):
                    moved = subspace.project(old.lift(state[key], G.shape))
                fresh[key] = moved
            fresh["step"] = state["step"]
        self.state[p] = {**fresh, **subspace.tensors(), _WINDOW: torch.tensor(window)}
        return subspace

    def _chosen(self, group: Group, p: Tensor, G: Tensor, window: int) -> Subspace:
        number = next(i for i, q in enumerate(group["params"]) if q is p)
        words = (group["seed"], window, number)
        return choose(group["projector"], G, group["density"], group["galore_basis"], words)

    # --- what a federation asks ------------------------------------------------------------------------

    @torch.no_grad()
    def begin_round(self, missed_rounds: int = 0, steps: int = 1) -> None:
        """Note where counts and rates of a coded reply begin."""
        self._begun = [(group["steps"], _inactive_lr(group)) for group in self.param_groups]

    @classmethod
    def check_coding(cls, options: Mapping[str, Any]) -> None:
        """Raise `ConfigError` unless inactive entries move by whole steps."""
        require_whole_steps(options)

    def coded(self, parameter: Tensor, old: NDArray) -> Array | None:
        """Return by how many steps entries moved that were inactive since `begin_round`; active ones whole.

        None for what had state throughout, and a tensor of "block" that was active. Raises `ConfigError` if
        the learning rate changed since, or anything but steps moved an entry.
        """
        number = next(i for i, g in enumerate(self.param_groups) if any(p is parameter for p in g["params"]))
        group = self.param_groups[number]
        if not group["is_proj"] or number >= len(self._begun):  # Or the group came within the round.
            return None
        first, size = self._begun[number]
        steps, sizes, whole = group["steps"] - first, (size, _inactive_lr(group)), None
        gap = group["update_gap"]
        windows = range(first // gap, (group["steps"] - 1) // gap + 1) if steps else range(0)
        if group["projector"] != "block":
            whole = self._ever_active(group, parameter, windows)
        elif any(parameter in self._active(group, window) for window in windows):
            return None
        if group["inactive_rule"] == "no":
            steps, sizes = 0, (0.0, 0.0)
        return step_counts(parameter, old, steps, sizes, whole)

    def _ever_active(self, group: Group, parameter: Tensor, windows: Iterable[int]) -> NDArray:
        """Return which rows (m, 1), columns (1, n) or entries (m, n) were active in one of ``windows``."""
        m, n = matrix_shape(parameter.shape)
        marks = np.zeros({"rows": (m, 1), "columns": (1, n)}.get(group["projector"], (m, n)), bool)
        blank = torch.zeros(()).expand(m, n)
        for window in windows:
            index = self._chosen(group, parameter, blank, window).tensors()["index"]
            marks.reshape(-1)[index.numpy()] = True
        return marks

    def export(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the moments of the active part, one number after the other, then zeros (not sent)."""
        group, state = self._group_of(parameter), self.state.get(parameter, {})
        sent = {key: state[key] for key in RULES[group["state_full"]] if key in state}
        if group["is_proj"] and group["projector"] != "block":
            sent = {key: _spread(moment, parameter) for key, moment in sent.items()}
        return sent

    def adopt(self, parameter: Tensor, sent: Mapping[str, Tensor], steps: int) -> None:
        """Continue from averaged moments of `export`, in the subspace of the last of ``steps`` steps."""
        group = self._group_of(parameter)
        group["steps"] = steps
        window = (steps - 1) // group["update_gap"]
        since = steps - window * group["update_gap"] if group["reset_statistics"] else steps
        moments = {key: sent[key] for key in RULES[group["state_full"]]}
        if not group["is_proj"]:
            super().adopt(parameter, moments, steps)
        elif group["projector"] != "block":
            blank = zeros_for(parameter).reshape(matrix_shape(parameter.shape))
            subspace = self._chosen(group, parameter, blank, window)
            shape = subspace.project(blank).shape
            super().adopt(parameter, {}, since)
            for key, moment in moments.items():
                held = moment.reshape(-1)[: shape.numel()].view(shape)
                self.state[parameter][key] = held.to(blank.dtype, copy=True)
            self.state[parameter] |= {**subspace.tensors(), _WINDOW: torch.tensor(window)}
        elif parameter in self._active(group, window):
            super().adopt(parameter, moments, since)
            self.state[parameter][_WINDOW] = torch.tensor(window)
        else:
            self.state[parameter] = {_WINDOW: torch.tensor(window)}

    def _group_of(self, parameter: Tensor) -> Group:
        return next(g for g in self.param_groups if any(q is parameter for q in g["params"]))


def _inactive_lr(group: Group) -> float:
    return float(group["lr"] * group["proj_lr_scale"] * group["inactive_lr_scale"])


def _spread(moment: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor of the parameter's shape with the moment's numbers first and zeros behind them."""
    flat = moment.new_zeros(parameter.numel())
    flat[: moment.numel()] = moment.reshape(-1)
    return flat.view(parameter.shape)
