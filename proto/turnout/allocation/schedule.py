"""AdaLoRA's cubic budget (arXiv 2303.10512, eq. 10), also used by SNELLA."""

from __future__ import annotations

from dataclasses import dataclass

from turnout.wire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CubicSchedule:
    """From ``start`` units during the first ``tinit`` steps down to ``end`` for the last ``tfinal``.

    Raises `ConfigError` when no step is left to come down in.
    """

    start: int
    end: int
    tinit: int
    tfinal: int
    total_step: int

    def __post_init__(self) -> None:
        if self.tinit < 0 or self.tfinal < 0:
            raise ConfigError(
                f"tinit={self.tinit} and tfinal={self.tfinal} count steps; use 0 or more for both."
            )
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave no step of total_step={self.total_step} "
                "to reduce the budget in; lower them or raise total_step."
            )

    def budget(self, step: int) -> int:
        """Return the units allowed after optimizer step ``step``, counted from 1 over the whole run."""
        if step <= self.tinit:
            return self.start
        if self.final(step):
            return self.end
        left = 1 - (step - self.tinit) / (self.total_step - self.tfinal - self.tinit)
        return int(self.end + (self.start - self.end) * left**3)

    def final(self, step: int) -> bool:
        """Return whether the last phase has begun, in which nothing is allocated anew."""
        return step > self.total_step - self.tfinal
