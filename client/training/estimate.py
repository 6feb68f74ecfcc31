"""The cost of a job at a site, measured before any record is read: one step on invented records, on the site's device.

Nothing of the measurement follows from a record, and nothing of it leaves the site. The trained values are thrown away.
"""

import dataclasses
import math
import re
import time
from dataclasses import dataclass

from offsite.client.training.emulator_session import EmulatorSession
from offsite.client.training.local_update import SiteJob, local_update
from offsite.client.training.privacy_plan import SitePlan
from offsite.errors import OffsiteError, TrainingFault
from offsite.privacy.per_example import line_of
from offsite.privacy.randomness import Randomness
from offsite.protos.job_manifest import JobManifest
from offsite.task.determinism import refusal_of
from offsite.task.device import device_of
from offsite.task.device_memory import GIGABYTE, free_memory, held_at_most, peak_of, shown

_TRIED = re.compile(r"tried to allocate ([0-9.]+) ?(bytes|KiB|MiB|GiB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Estimate:
    """What a job costs at a site.

    Attributes:
      device: name of the device that was measured.
      engine: name of the per-example gradient engine that the probe chose.
      batch: records in the measured step.
      step_seconds: seconds of a step whatever the number of its records, noise and update included.
      record_seconds: seconds of one further record in a step.
      round_seconds: seconds of a round's training at the expected batch.
      job_seconds: seconds of the training of all rounds, spare rounds not included.
      peak_bytes: most memory held at once: on the CPU by the whole process, else by the device's allocator.
    """

    device: str
    engine: str
    batch: int
    step_seconds: float
    record_seconds: float
    round_seconds: float
    job_seconds: float
    peak_bytes: int

    def line(self) -> str:
        """Returns one sentence for the owner."""
        return (
            f"a round trains for about {_duration(self.round_seconds)}, the job for about "
            f"{_duration(self.job_seconds)}; peak memory {self.peak_bytes / GIGABYTE:.2f} GiB {shown(self.device)}, "
            f"engine {self.engine}; measured on {self.batch} invented records on {self.device}"
        )


def estimate(session: EmulatorSession, manifest: JobManifest, site: str) -> Estimate:
    """Returns the cost of a job, from whole steps on invented records: probe, gradients, clip, noise and update.

    Args:
      session: vetted emulator, whose adapter is as attached afterwards.
      manifest: manifest of the job.
      site: name of the site.

    Raises:
      TrainingFault: the device cannot hold one record, or the model fails on invented records.
      PrivacyRefusal: no engine gives right per-example gradients for this model.
    """
    device, batch = device_of(session.model), max(1, min(manifest.physical_batch, math.ceil(manifest.privacy.batch)))
    with peak_of(device) as peak:
        _trained(session, manifest, site, batch)  # loads libraries and kernels, and finds the batch that fits
        alone = _trained(session, manifest, site, 1)
        together = _trained(session, manifest, site, batch)
    record = max(0.0, together - alone) / (batch - 1) if batch > 1 else alone
    step = max(0.0, alone - record)
    rounds = manifest.local_steps * (step + record * manifest.privacy.batch)
    name = session.engine or "forward passes"
    return Estimate(str(device), name, batch, step, record, rounds, manifest.rounds * rounds, peak.bytes)


def _trained(session: EmulatorSession, manifest: JobManifest, site: str, batch: int) -> float:
    """Trains one step on as many invented records as a batch has, and returns its seconds; nothing stays changed."""
    invented = session.task.dummy_batch(session.model, manifest.length, seed=session.seed).select([0] * batch)
    plan = SitePlan(batch, sample_rate=1.0, delta=1e-6, noise_multiplier=1.0, epsilon=math.inf, steps=1)
    job = SiteJob(site, dataclasses.replace(manifest, local_steps=1), session, invented, plan)
    began = time.monotonic()
    try:
        local_update(job, session.start, randomness=Randomness.from_os())
        held_at_most(device_of(session.model))  # waits for the device
    except MemoryError as error:
        raise _too_small(session, manifest, error) from None
    except OffsiteError:
        raise
    except Exception as error:  # no record has a part in it, so the owner may read the words
        raise refusal_of(error) or TrainingFault(
            f"training fails on invented records: {type(error).__name__}: {line_of(error)}; put the site's libraries, "
            "its device and its settings right"
        ) from None
    finally:
        session.put(session.start)
    return time.monotonic() - began


def _too_small(session: EmulatorSession, manifest: JobManifest, error: MemoryError) -> TrainingFault:
    device = device_of(session.model)
    held, asked = held_at_most(device), _TRIED.search(str(error))
    more = int(float(asked[1]) * _UNITS[asked[2].lower()]) if asked else 0
    return TrainingFault(
        f"memory={free_memory(device) / GIGABYTE:.2f} GiB free {shown(device)}: one record of length={manifest.length} "
        f"needs {(held + more) / GIGABYTE:.2f} GiB there or more; free memory, take a larger device, set weights = "
        "'stored' in site.toml, raise max_memory_gb in policy.toml on a CPU, or ask for a shorter length"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
