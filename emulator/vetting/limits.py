"""The thresholds of a vetting, one for each trap, and the report with every check's worst number."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from offsite.errors import UnsupportedModel


@dataclass(frozen=True)
class VettingThresholds:
    """The bounds of an honest emulator; a bound is an upper bound unless its name begins with `least_`."""

    weight_peak: float = 1e3
    table_rms: float = 100.0
    matrix_rms: float = 10.0
    least_rms: float = 1e-5
    one_hot: float = 0.05
    one_hot_rows: float = 0.1
    table_outlier: float = 50.0
    token_crowd: float = 0.9
    crowd: float = 0.05
    outlier: float = 50.0
    zeros: float = 0.5
    gain: float = 1e3
    closed_gains: float = 0.5
    dead_gradients: float = 0.5
    token_share: float = 0.8
    single_rows: float = 0.25
    least_mixed: float = 0.02
    least_change: float = 1e-3
    least_loudest: float = 1e-5
    growth: float = 1e3
    least_apart: float = 1e-4
    sureness: float = 0.99
    least_context: float = 1e-4
    max_rank: int = 16
    max_first_rank: int = 8
    adapter_share: float = 0.25
    adapter_peak: float = 100.0

    @classmethod
    def for_owner(cls, rank: int, share: float) -> "VettingThresholds":
        """Returns the thresholds of an owner who limits an adapter's rank, halved in the first block, and its share.

        Args:
          rank: largest rank of an adapter.
          share: largest number of trained values over the number of the slots' parameters.
        """
        return cls(max_rank=rank, max_first_rank=max(rank // 2, 1), adapter_share=share)


@dataclass(frozen=True)
class Check:
    """One measured number beside its limit.

    Attributes:
      name: name of the check.
      where: name of the measured tensor, block or module.
      value: measured number; a number that is not finite never passes.
      limit: bound of the number.
      why: meaning of a number beyond the limit, for the message.
      least: True if the limit is a lower bound.
    """

    name: str
    where: str
    value: float
    limit: float
    why: str
    least: bool = False

    @property
    def passed(self) -> bool:
        """True if the number keeps to its limit."""
        if not math.isfinite(self.value):
            return False
        return self.value >= self.limit if self.least else self.value <= self.limit

    @property
    def used(self) -> float:
        """Share of the limit that the number uses, in 0..1; infinite for a check that failed."""
        if not self.passed:
            return float("inf")
        part, whole = (self.limit, self.value) if self.least else (self.value, self.limit)
        return part / whole if whole else 0.0


@dataclass(frozen=True)
class Vetting:
    """The report of a vetting that found no trap: for each check, the number that came nearest to its limit.

    Attributes:
      checks: worst result of each kind of check, in the order in which the checks ran.
      measured: count of numbers that were compared with a limit.
    """

    checks: tuple[Check, ...]
    measured: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form, for the audit log."""
        return {"measured": self.measured, "checks": [asdict(check) for check in self.checks]}


def passed(checks: Iterable[Check]) -> Iterator[Check]:
    """Yields checks as long as they pass.

    Raises:
      UnsupportedModel: a check does not pass; the message has its number, its limit and its meaning.
    """
    for check in checks:
        if not check.passed:
            raise refusal(check)
        yield check


def refusal(check: Check) -> UnsupportedModel:
    """Returns the error for a check that does not pass."""
    word = "at least" if check.least else "at most"
    return UnsupportedModel(
        f"vetting {check.name}={check.value:.4g} at {check.where}: must be {word} {check.limit:g}, or {check.why}; do "
        "not train on this emulator, ask the coordinator for another"
    )


def report(checks: Iterable[Check]) -> Vetting:
    """Returns the report over checks that all passed."""
    worst: dict[str, Check] = {}
    measured = 0
    for check in checks:
        measured += 1
        if check.name not in worst or check.used > worst[check.name].used:
            worst[check.name] = check
    return Vetting(tuple(worst.values()), measured)
