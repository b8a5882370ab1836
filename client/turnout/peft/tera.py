"""TeRA (arXiv 2509.03234): a frozen random tensor network whose small diagonals are trained.

The structure is from the abstract: a Tucker network, core and factors frozen and shared by layers of one
shape, diagonal matrices between factors and core trained per layer. First values and scales are a
reconstruction after VeRA. The update's rank does not depend on how little is trained.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from turnout.allocation import NetworkForm
from turnout.peft.config import AdapterConfig, check_averaging
from turnout.peft.layer import AdapterLayer, check_buffers, weight_of
from turnout.tasks.training_part import TrainingPart
from turnout.tasks.validation import check_count, check_number
from turnout.wire.errors import ConfigError, unknown_name
from turnout.wire.registry import register

_LARGEST_MODE = 32


@register(
    "tera", kind="adapter", paper="2509.03234", summary="Diagonals in a frozen random tensor network (TeRA)"
)
@dataclass(frozen=True, kw_only=True)
class TeraConfig(AdapterConfig):
    """TeRA: ``delta = s reshape(G x_1 A_1 D_1 x_2 ... x_N A_N D_N)``, only the diagonals D_n are trained.

    What travels is sum R_n numbers per layer, with "cyclic" training those of one mode. Core G
    (R_1, ..., R_N) and factors A_n (I_n, R_n) are drawn from a seed, for each shape of layer once.

    Attributes
    ----------
    out_modes, in_modes
        Factors of d_out and d_in, the first one slowest; by default of about equal size, 32 at most if
        possible.
    ranks
        R_n of all modes, outputs first, or one number for all; by default I_n, at most 16 where a side of the
        weight is above 1024.
    d_initial
        First value of the diagonals, but for the first one, which is 0 so that the change is.
    scale
        The factor s.
    train_modes
        "cyclic": one mode per round, in turn; the change is linear in it, so that its mean is exact. "all":
        all modes at once, whose mean is not the mean of the changes.
    projection_prng_key
        Seed of core and factors, by default ``seed``.
    save_projection
        Save core and factors with the adapter, not only their seed.
    aggregation
        "exact" with cyclic training. With "all", "approximate" averages the diagonals, "exact-als" the dense
        updates, with whichever rule the strategy has: the server, which has the network too, sends diagonals
        fitted to the result by alternating least squares. That is as near as the network comes, or nearly,
        and costs the server memory for dense layers.
    """

    aggregation: Literal["approximate", "exact", "exact-als"] = "approximate"  # type: ignore[misc]
    shares: ClassVar[bool] = True

    out_modes: tuple[int, ...] | None = None
    in_modes: tuple[int, ...] | None = None
    ranks: int | tuple[int, ...] | None = None
    d_initial: float = 1.0
    scale: float = 1.0
    train_modes: Literal["cyclic", "all"] = "cyclic"
    projection_prng_key: int | None = None
    save_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scale", self.scale, low=0, open_low=True)
        check_number("d_initial", self.d_initial, low=0, open_low=True)
        if self.train_modes not in ("cyclic", "all"):
            raise unknown_name("train_modes", str(self.train_modes), ("cyclic", "all"))
        if self.projection_prng_key is not None:
            check_count("projection_prng_key", self.projection_prng_key, low=0)
        for field in ("out_modes", "in_modes", "ranks"):
            value = getattr(self, field)
            for number in value if isinstance(value, (tuple, list)) else () if value is None else (value,):
                check_count(field, number, low=1)

        cyclic = self.train_modes == "cyclic"
        if cyclic and self.aggregation == "exact-als":
            raise ConfigError(
                "aggregation='exact-als' has no use with train_modes='cyclic', which is exact by itself; use "
                "train_modes='all' with it."
            )
        if cyclic:
            object.__setattr__(self, "aggregation", "exact")
        else:
            check_averaging(self.aggregation, "exact-als")

    @property
    def dense_form(self) -> NetworkForm | None:  # type: ignore[override]
        """The diagonals' name and the scale, if the server averages dense updates."""
        return NetworkForm("tera_d", self.scale) if self.aggregation == "exact-als" else None

    def layers(self, targets: Mapping[str, nn.Module]) -> dict[str, AdapterLayer]:
        """Return the adapters; layers of one shape share one network's core and factors."""
        networks: dict[tuple[int, int], Network] = {}
        made: dict[str, AdapterLayer] = {}
        for name, base in targets.items():
            d_out, d_in = weight_of(base).shape
            if (d_out, d_in) not in networks:
                networks[d_out, d_in] = self.network(d_out, d_in)
            made[name] = Tera(base, self, networks[d_out, d_in])
        return made

    def layer(self, name: str, base_layer: nn.Module, generator: torch.Generator) -> Tera:
        """Return the adapter of one layer, on a network of its own."""
        return Tera(base_layer, self, self.network(*weight_of(base_layer).shape))

    def network(self, d_out: int, d_in: int) -> Network:
        """Draw core and factors for weights of shape (d_out, d_in), the same on every machine."""
        out_modes = _modes("out_modes", self.out_modes, d_out)
        modes = (*out_modes, *_modes("in_modes", self.in_modes, d_in))
        ranks = self.ranks
        if ranks is None:
            ranks = modes if max(d_out, d_in) <= 1024 else tuple(min(n, 16) for n in modes)
        ranks = (ranks,) * len(modes) if isinstance(ranks, int) else tuple(ranks)
        if len(ranks) != len(modes):
            raise ConfigError(
                f"ranks={list(ranks)} are {len(ranks)} numbers, but a weight of shape ({d_out}, {d_in}) has "
                f"{len(modes)} modes {list(modes)}; give one rank per mode, or one number."
            )
        key = self.seed if self.projection_prng_key is None else self.projection_prng_key
        generator = replace(self, seed=key).generator(f"{d_out} x {d_in}")
        factors = [
            torch.randn(n, r, generator=generator) / math.sqrt(r) for n, r in zip(modes, ranks, strict=True)
        ]
        inner = math.prod(ranks[len(out_modes) :])
        core = torch.randn(ranks, generator=generator) / math.sqrt(inner)
        return Network(core, factors, len(out_modes))


@dataclass(frozen=True)
class Network:
    """The frozen pieces: ``core`` (R_1, ..., R_N) and ``factors`` (I_n, R_n), of which ``outputs`` are
    d_out's."""

    core: Tensor
    factors: list[Tensor]
    outputs: int

    @property
    def checksum(self) -> str:
        """SHA-256 of the bytes: random streams may differ between versions of PyTorch."""
        digest = hashlib.sha256()
        for tensor in (self.core, *self.factors):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


class Tera(AdapterLayer, TrainingPart):
    """A linear layer with trained diagonals ``tera_d`` of R_1, ..., R_N numbers."""

    config: TeraConfig
    stackable = False

    def __init__(self, base_layer: nn.Module, config: TeraConfig, network: Network) -> None:
        super().__init__(base_layer, config)
        self.outputs = network.outputs
        self.checksum = network.checksum
        self.tera_core: Tensor
        self.register_buffer("tera_core", network.core, persistent=config.save_projection)
        for n, factor in enumerate(network.factors):
            self.register_buffer(f"tera_factor_{n}", factor, persistent=config.save_projection)
        self.tera_d = nn.ParameterList(
            nn.Parameter(torch.full((r,), config.d_initial if n else 0.0))
            for n, r in enumerate(network.core.shape)
        )
        self._mode: int | None = None

    @property
    def factors(self) -> list[Tensor]:
        """A_1, ..., A_N."""
        return [cast(Tensor, getattr(self, f"tera_factor_{n}")) for n in range(len(self.tera_d))]

    def scaled_factors(self) -> list[Tensor]:
        """Return ``A_n D_n``: column j of A_n times entry j of d_n."""
        return [factor * d for factor, d in zip(self.factors, self.tera_d, strict=True)]

    def delta_weight(self) -> Tensor:
        """Return the network's value, as Kronecker products of the scaled factors around the core."""
        scaled = self.scaled_factors()
        left, right = reduce(torch.kron, scaled[: self.outputs]), reduce(torch.kron, scaled[self.outputs :])
        core = self.tera_core.reshape(left.shape[1], right.shape[1])
        return self.config.scale * (left @ core @ right.T)

    def adapted(self, x: Tensor) -> Tensor:
        """Return the base layer's output plus the network applied to x, mode by mode."""
        base: Tensor = self.base_layer(x)
        scaled = self.scaled_factors()
        inputs, outputs = scaled[self.outputs :], scaled[: self.outputs]
        left, right = (math.prod(f.shape[1] for f in factors) for factors in (outputs, inputs))
        z = x.to(self.tera_core.dtype).reshape(-1, *(f.shape[0] for f in inputs))
        z = apply_modes(z, [f.T for f in inputs]).reshape(-1, right)
        z = z @ self.tera_core.reshape(left, right).T
        z = apply_modes(z.reshape(-1, *(f.shape[1] for f in outputs)), outputs)
        return base + (self.config.scale * z.reshape(base.shape)).to(base.dtype)

    def start_training(self, server_round: int, seed: tuple[int, ...]) -> None:
        """Choose the round's mode: the first in round 1, then the next."""
        self._mode = (server_round - 1) % len(self.tera_d) if self.config.train_modes == "cyclic" else None

    def resting(self) -> list[Tensor]:
        """Return the diagonals of the other modes."""
        return [] if self._mode is None else [d for n, d in enumerate(self.tera_d) if n != self._mode]

    def end_training(self) -> None:
        """Go back to all modes: a large-batch gradient has them all."""
        self._mode = None

    def shared_state(self) -> dict[str, Tensor]:
        """Return the network's checksum, as bytes; with ``save_projection`` the network as well."""
        state = {"tera_checksum": torch.tensor(list(bytes.fromhex(self.checksum)), dtype=torch.uint8)}
        if self.config.save_projection:
            state |= {"tera_core": self.tera_core}
            state |= {f"tera_factor_{n}": factor for n, factor in enumerate(self.factors)}
        return state

    @property
    def shared_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names in `shared_state`."""
        return tuple(self.shared_state())

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Take over a network that came along, or check that the own one is the server's.

        Raises `ConfigError` for another network: drawn by another seed, or another version of PyTorch.
        """
        own = self.shared_state()
        check_buffers(own, state)
        checksum = self.checksum
        if self.config.save_projection:
            given = {name: state[name].detach().clone().to(own[name].device) for name in own}
            factors = [given[f"tera_factor_{n}"] for n in range(len(self.tera_d))]
            checksum = Network(given["tera_core"], factors, self.outputs).checksum
        if bytes(state["tera_checksum"].tolist()).hex() != checksum:
            raise ConfigError(
                "the frozen network differs from the server's (checksum); use the same seed and version of "
                "PyTorch, or save_projection=true to send the network itself."
            )
        self.checksum = checksum
        for name in own if self.config.save_projection else ():
            if name != "tera_checksum":
                setattr(self, name, given[name])


def apply_modes(z: Tensor, matrices: list[Tensor]) -> Tensor:
    """Multiply each mode n of z, shape (batch, J_1, ..., J_m), by ``matrices[n]`` (K_n, J_n)."""
    for n, matrix in enumerate(matrices, start=1):
        # Under autocast the product with the core is in bfloat16, and tensordot casts nothing by itself.
        z = torch.tensordot(z, matrix.to(z.dtype), dims=([n], [1])).movedim(-1, n)
    return z


def _modes(field: str, given: tuple[int, ...] | None, side: int) -> tuple[int, ...]:
    if given is None:
        return default_modes(side)
    if math.prod(given) != side:
        raise ConfigError(
            f"{field}={list(given)} multiply to {math.prod(given)}, but the weight's side is {side}; "
            "give factors of it, or leave it out."
        )
    return tuple(given)


def default_modes(side: int) -> tuple[int, ...]:
    """Return factors of ``side`` of about equal size, at most 32 if its prime factors allow it."""
    modes: list[int] = []
    rest = side
    for left in range(math.ceil(math.log(max(side, 2), _LARGEST_MODE) - 1e-9), 1, -1):
        wanted = rest ** (1 / left)
        factor = min(
            (n for n in range(2, rest) if rest % n == 0), key=lambda n: abs(n - wanted), default=rest
        )
        modes.append(factor)
        rest //= factor
    return tuple(modes) if rest == 1 and modes else (*modes, rest)
