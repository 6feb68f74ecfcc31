"""What is about to leave the site with a round, in words and numbers that its owner can check; written first."""

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from offsite.adapter.layout import Layout
from offsite.client.home.audit import Audit
from offsite.client.home.policy import ANY, Policy
from offsite.errors import PolicyRefusal, RangeError

ENTRY_BYTES = 4


@dataclass(frozen=True)
class EgressReport:
    """One release; no value of the update stands here but its norm, which the owner alone reads.

    Attributes:
      job: digest of the job manifest, hexadecimal.
      round: training round.
      tensors: (name, shape) of everything that is in the update.
      upload_bytes: bytes of the masked vector.
      norm: Euclidean norm of the update before it was masked.
      epsilon_round: what this release adds.
      epsilon_total: what the data set has then spent, over all jobs.
      metrics: told beside the update.
    """

    job: str
    round: int
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    upload_bytes: int
    norm: float
    epsilon_round: float
    epsilon_total: float
    metrics: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return dataclasses.asdict(self)


def release(report: EgressReport, layout: Layout, policy: Policy, audit: Audit, *, now: datetime) -> None:
    """Checks a report against what was announced and permitted, and writes it to the audit log; then it may leave.

    Raises:
      RangeError: the upload is not the announced size, or the update or a metric is not finite.
      PolicyRefusal: a metric that the owner did not permit.
      DataError: the audit log cannot be written; nothing may leave then.
    """
    if report.upload_bytes != ENTRY_BYTES * layout.size:
        raise RangeError(
            f"upload_bytes={report.upload_bytes}: the layout of the job has {ENTRY_BYTES * layout.size}; nothing leaves"
        )
    if not np.isfinite(report.norm):
        raise RangeError("update norm is not finite; nothing leaves")
    for name, value in report.metrics.items():
        if ANY not in policy.metrics and name not in policy.metrics:
            raise PolicyRefusal(f"metric={name!r}: not in metrics of policy.toml; nothing leaves")
        if not np.isfinite(value):
            raise RangeError(f"metric={name!r} is not finite; nothing leaves")
    audit.record("egress", now=now, **report.to_dict())
