"""The emulator at the coordinator, as its sites have it: adapters are corrected by it, and its biases refreshed."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offsite.adapter.methods import attach
from offsite.coordinator.job.evaluate import score
from offsite.coordinator.job.prepare import Job
from offsite.coordinator.job.store import Progress
from offsite.emulator.calibration.public_examples import PublicExamples
from offsite.emulator.package import package_reader
from offsite.emulator.runtime.plug_in import plug
from offsite.emulator.runtime.refresh import plain_of, refreshed
from offsite.emulator.runtime.refresh_state import Frame, Refresh, Refreshable
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.emulator.vetting.vet import vet_refresh
from offsite.errors import UnsupportedModel

log = logging.getLogger("offsite.coordinator")


@dataclass(frozen=True)
class DeployedEmulator:
    """One loaded package with the job's adapter, float32.

    Attributes:
      job: whose full model it stands for.
      model: the emulator with the adapter attached.
      frame: of the package.
      biases: of the emulator, as far as they may move.
    """

    job: Job
    model: Any
    frame: Frame
    biases: Refreshable

    @classmethod
    def open(cls, folder: Path, job: Job) -> "DeployedEmulator":
        """Loads the package of a job as a site does.

        Raises:
          DigestMismatch, MalformedMessage, RangeError: as for `package.load`.
        """
        plain = package_reader.load(folder, dtype=torch.float32, expected_digest=job.emulator.facts.digest())
        frame = Frame.of(folder, job.emulator.facts)
        biases = Refreshable.of(plain, job.emulator.facts, frame)
        return cls(job, attach(plain, job.manifest.adapter, job.given), frame, biases)

    def refreshed(self, progress: Progress) -> tuple[Refresh, dict[str, Any]]:
        """Returns the biases that go with the next round, and what the line of this one says about them.

        The target is the full model as it is after the round, with the adapter as it was plugged in. What comes out is
        kept where the emulator with its adapter has a lower loss on public text that nothing was fitted to; else the
        biases stay as they were.

        Args:
          progress: after an accepted round, with the biases that its sites trained on.
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
        losses = [loss if math.isfinite(loss) else None for loss in (before, after)]
        return moved if kept else progress.refresh, {"refreshed": kept, "emulator_loss": losses}

    def _would_pass(self, moved: Refresh) -> bool:
        """Whether a site would train on it: one that all sites refuse would end the job."""
        plug(self.model, self.job.layout, self.job.start)
        try:
            vet_refresh(plain_of(self.model), self.frame, self.biases.read(moved), VettingThresholds(), seed=0)
        except UnsupportedModel as error:
            log.warning("the refreshed emulator does not pass a vetting, and is not sent: %s", error)
            return False
        return True

    def _loss(self) -> float:
        job = self.job
        return score(job.task, self.model, job.public.test, batch=job.manifest.physical_batch).loss
