"""The phases of a site: memory over the imports, and seconds, each in one small formula.

Each class counts one phase as the code runs it today; a change of the code changes one class. Weights are counted from
the package on paper, all else by the trial on the meta device. `python -m bench.plan_memory` compares every formula
with what a process takes.
"""

from dataclasses import dataclass

from offsite.coordinator.plan.device_profile import DeviceProfile
from offsite.coordinator.plan.meta_run import Work
from offsite.coordinator.plan.model_outline import FLOAT32
from offsite.coordinator.plan.paper_package import PaperPackage
from offsite.coordinator.plan.trial import DECODED, Trials
from offsite.secagg.ring import BITS

# The C library's allocator keeps freed pieces that no later tensor fits; measured, see docs/plan.md.
HEAP = 1.4
FIVE_FLOATS = 40  # bytes for each entry of an adapter: sum and noise in float64, update and ring elements


@dataclass(frozen=True)
class Phase:
    """One phase of one party.

    Attributes:
      name: name of the phase.
      memory: peak in bytes over the imports.
      seconds: time; None without a profile of the device.
      says: what is done, in words.
    """

    name: str
    memory: int
    seconds: float | None
    says: str


def seconds(work: Work, profile: DeviceProfile | None) -> float | None:
    """Returns the time of some work on a device, or None without a profile."""
    return None if profile is None else work.flops / profile.flops + work.traffic / profile.traffic


@dataclass(frozen=True)
class Site:
    """A site with one emulator.

    Attributes:
      package: the emulator.
      trials: work of the emulator with its adapter.
      stored: whether dense layers and tables of words are held as the package stores them.
      batch: expected number of records of a step.
      physical: number of records in one pass.
      steps: steps of one round.
      sites: number of sites of the federation.
    """

    package: PaperPackage
    trials: Trials
    stored: bool
    batch: int
    physical: int
    steps: int
    sites: int

    @property
    def resident(self) -> int:
        """Bytes of the opened emulator: float32, or as the package stores dense layers and tables of words."""
        return self.package.in_memory if self.stored else self.package.widened

    def opening(self, profile: DeviceProfile | None) -> Phase:
        """Counts the opened emulator and one tensor being widened: tensors are read one at a time."""
        memory = self.resident + DECODED * self.package.largest
        time = None
        if profile is not None:
            time = 2 * self.package.bytes / profile.reading + 4 * self.package.widened / profile.traffic
        return Phase("opening", memory, time, "check and open the package")

    def vetting(self, profile: DeviceProfile | None) -> Phase:
        """Counts the opened emulator, and a pass forwards and backwards on the vetting's random tokens.

        Weights are checked a block of rows at a time, which takes less.
        """
        memory = self.resident + round(HEAP * self.trials.vetting.peak)
        passes = seconds(self.trials.vetting.times(2), profile)
        time = None if profile is None or passes is None else passes + 8 * self.package.widened / profile.traffic
        return Phase("vetting", memory, time, "look for traps in weights and activations")

    def step(self, profile: DeviceProfile | None) -> Phase:
        """Counts the opened emulator, one physical batch forwards and backwards, and the adapter's sums and noise."""
        upload = self.trials.upload
        memory = self.resident + round(HEAP * self.trials.step.peak) + FIVE_FLOATS * upload
        time = seconds(self.trials.step.times(self.batch / self.physical), profile)
        if profile is not None and time is not None:
            time = self.steps * (time + upload / profile.noise)
        return Phase("step", memory, time, f"train privately, {self.steps} step(s) of {self.batch} records, each round")

    def upload(self, profile: DeviceProfile | None) -> Phase:
        """Counts the masked update beside the opened emulator: one ring element for each entry."""
        count = self.trials.upload
        time = None if profile is None else count * (self.sites - 1) / profile.masking
        return Phase("upload", self.resident + FIVE_FLOATS * count, time, "mask the update, each round")

    def phases(self, profile: DeviceProfile | None) -> tuple[Phase, ...]:
        """Returns all phases in order."""
        return (self.opening(profile), self.vetting(profile), self.step(profile), self.upload(profile))

    @property
    def bytes_up(self) -> int:
        """Bytes of one masked update; the keys and shares around it are some kilobytes."""
        return BITS // 8 * self.trials.upload

    @property
    def bytes_down(self) -> int:
        """Bytes of the adapter that a site gets each round."""
        return FLOAT32 * self.trials.upload
