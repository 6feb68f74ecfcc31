"""The coordinator's record of one whole round: one line of `rounds.jsonl`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from offsite.coordinator.job.json_form import OMITTED


@dataclass(frozen=True)
class Dropped:
    """A site that dropped out of a round, with the stage and the reason; the reason may be the site's own words."""

    site: str
    stage: str
    reason: str


@dataclass(frozen=True)
class RoundRecord:
    """One whole round. The fields are the keys of the file; a default stands for a key that older releases lack.

    Attributes:
      round: number of the round, from 1.
      members: sites whose updates count.
      threshold: smallest number of members of a round.
      accepted: whether the new adapter was taken over.
      public_loss: loss of the full model with the new adapter on public records, in the task's unit; None where the
        loss is not finite.
      seconds: duration of the round at the coordinator, waits for sites included.
      dropped: sites that dropped out.
      faulty: sites whose released share did not fit the shares of the others.
      update_norm: Euclidean length of the mean update.
      bytes_down: bytes to all sites.
      bytes_up: bytes from all sites.
      upload_bytes: bytes of the largest upload.
      payload_bytes: bytes of one update as plain 32-bit numbers.
      individuals: whether the coordinator saw each site's own update.
      reason: verdict of the acceptance test in words.
      scale: share of the update that was taken over, from 0 to 1.
      correction: strength with which the adapter was corrected before it was plugged in; 0 without a correction.
      refresh_bytes: bytes of the emulator's biases that went with the round; None in a job without refreshes.
      refresh_share: refresh_bytes as a share of the package's bytes; None in a job without refreshes.
      refreshed: whether a refresh after the round was kept; None where no refresh was due.
      emulator_loss: public loss of the emulator before and after the refresh; None where no refresh was due.
      site_losses: mean training loss of each site; known in a simulation only.
    """

    round: int
    members: tuple[str, ...]
    threshold: int = 0
    dropped: tuple[Dropped, ...] = ()
    faulty: tuple[str, ...] = ()
    update_norm: float | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    upload_bytes: int = 0
    payload_bytes: int = 0
    individuals: bool = False
    seconds: float = 0.0
    accepted: bool = True
    reason: str = ""
    scale: float = 1.0
    correction: float = 0.0
    public_loss: float | None = None
    refresh_bytes: int | None = field(default=None, metadata=OMITTED)
    refresh_share: float | None = field(default=None, metadata=OMITTED)
    refreshed: bool | None = field(default=None, metadata=OMITTED)
    emulator_loss: tuple[float | None, float | None] | None = field(default=None, metadata=OMITTED)
    site_losses: Mapping[str, float] | None = field(default=None, metadata=OMITTED)
