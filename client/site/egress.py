"""The report of an update, in numbers that the owner can check; written before the update leaves."""

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from offsite.adapter.layout import Layout
from offsite.client.home.audit import Audit
from offsite.errors import RangeError

ENTRY_BYTES = 4


@dataclass(frozen=True)
class EgressReport:
    """One release, for the owner alone; the norm is the only value of the update in the report.

    Attributes:
      job: digest of the job manifest, hexadecimal.
      round: number of the training round.
      tensors: name and shape of every tensor in the update.
      upload_bytes: size of the vector that leaves, bytes.
      norm: Euclidean norm of the update before masking.
      epsilon_round: epsilon that this release adds.
      epsilon_total: epsilon that the data set has then spent, over all jobs.
      delta: delta of both epsilons.
    """

    job: str
    round: int
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    upload_bytes: int
    norm: float
    epsilon_round: float
    epsilon_total: float
    delta: float

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return dataclasses.asdict(self)


def release(report: EgressReport, layout: Layout, audit: Audit, *, now: datetime) -> None:
    """Checks a report against the job, and writes it to the audit log; then the update may leave.

    Raises:
      RangeError: the upload has not the announced size, or the update is not finite.
      DataError: the audit log cannot be written, so the update may not leave.
    """
    if report.upload_bytes != ENTRY_BYTES * layout.size:
        raise RangeError(
            f"upload_bytes={report.upload_bytes}: the layout of the job has {ENTRY_BYTES * layout.size}; nothing leaves"
        )
    if not np.isfinite(report.norm):
        raise RangeError("update norm is not finite; nothing leaves")
    audit.record("egress", now=now, **report.to_dict())
