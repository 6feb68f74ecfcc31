"""The deployed emulator at the coordinator: adapters are corrected with it, and its biases are refreshed."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.adapter.methods import attach
from offsite.coordinator.job.evaluate import score
from offsite.coordinator.job.prepare import Job
from offsite.coordinator.job.score import Score
from offsite.coordinator.job.store import Progress
from offsite.emulator.calibration.public_examples import PublicExamples
from offsite.emulator.package import package_reader
from offsite.emulator.runtime.plug_in import plug
from offsite.emulator.runtime.refresh import plain_of, refreshed
from offsite.emulator.runtime.refresh_state import Frame, Refresh, Refreshable
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.emulator.vetting.vet import vet_refresh
from offsite.errors import UnsupportedModel
from offsite.task.device import device_of
from offsite.task.number_format import dtype_of

log = logging.getLogger("offsite.coordinator")


@dataclass(frozen=True)
class RefreshTrial:
    """How a refresh of the emulator went.

    Attributes:
      kept: whether the refreshed emulator is used.
      losses: public loss of the emulator before and after; None where it is not finite.
    """

    kept: bool
    losses: tuple[float | None, float | None]


@dataclass(frozen=True)
class DeployedEmulator:
    """One loaded package with the job's adapter, in the number format of the full model.

    Attributes:
      job: job whose full model the emulator stands for.
      model: emulator with the adapter attached.
      frame: frame of the package.
      biases: biases of the emulator that may move.
    """

    job: Job
    model: Any
    frame: Frame
    biases: Refreshable

    @classmethod
    def open(cls, folder: Path, job: Job) -> "DeployedEmulator":
        """Loads the package of a job as a site does.

        Raises:
          DigestMismatch, MalformedMessage, RangeError: as for `package_reader.load`.
        """
        plain = package_reader.load(folder, dtype=dtype_of(job.full), expected_digest=job.emulator.facts.digest())
        plain = plain.to(device_of(job.full))
        frame = Frame.of(folder, job.emulator.facts)
        biases = Refreshable.of(plain, job.emulator.facts, frame)
        return cls(job, attach(plain, job.manifest.adapter, job.given), frame, biases)

    def refreshed(self, progress: Progress) -> tuple[Refresh, RefreshTrial]:
        """Returns the biases for the next round, and the facts about them for this round's line in the report.

        The biases are fitted to the full model after the round, with the plugged-in adapter. The new biases are kept if
        the emulator with its adapter then has a lower loss on public text that nothing was fitted to; else the old
        biases stay.

        Args:
          progress: state after an accepted round, with the biases on which its sites trained.
        """
        job = self.job
        plug(job.full, job.layout, progress.plugged)
        plug(self.model, job.layout, progress.server.adapter)
        self.biases.put(progress.refresh)
        before = self._loss()
        public = PublicExamples(job.task, job.public.calibration, job.manifest.physical_batch)
        moved = refreshed(job.full, self.model, self.frame, self.biases, public.run)
        self.biases.put(moved)
        after = self._loss()
        kept = after < before and self._would_pass(moved)
        losses = (before if math.isfinite(before) else None, after if math.isfinite(after) else None)
        return moved if kept else progress.refresh, RefreshTrial(kept, losses)

    def _would_pass(self, moved: Refresh) -> bool:
        """Returns whether a site would train on a refresh; a refresh that all sites refuse would end the job."""
        plug(self.model, self.job.layout, self.job.start)
        try:
            vet_refresh(plain_of(self.model), self.frame, self.biases.read(moved), VettingThresholds(), seed=0)
        except UnsupportedModel as error:
            log.warning("the refreshed emulator does not pass the vetting and is not sent: %s", error)
            return False
        return True

    def tuned(self, progress: Progress) -> Score:
        """Returns the score on public records of the emulator as its sites have it after the last round."""
        plug(self.model, self.job.layout, progress.server.adapter)
        self.biases.put(progress.refresh)
        return self._score()

    def _loss(self) -> float:
        return self._score().loss

    def _score(self) -> Score:
        job = self.job
        return score(job.task, self.model, job.public.test, batch=job.manifest.physical_batch)
