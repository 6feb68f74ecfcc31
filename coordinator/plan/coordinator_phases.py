"""The phases of the coordinator: memory over the imports, and seconds, each in one small formula.

As `site_phases`: each method counts one phase as the code runs it today.
"""

from dataclasses import dataclass

from offsite.coordinator.job.public_counts import CLIP_EXAMPLES
from offsite.coordinator.job.public_records import CALIBRATION_EXAMPLES, GATE_EXAMPLES
from offsite.coordinator.plan.device_profile import DeviceProfile
from offsite.coordinator.plan.meta_run import Work
from offsite.coordinator.plan.model_outline import FLOAT32
from offsite.coordinator.plan.paper_package import PaperPackage
from offsite.coordinator.plan.site_phases import FIVE_FLOATS, HEAP, Phase, seconds
from offsite.coordinator.plan.trial import DECODED, Trials

PAIR = 2  # examples in one pass of the gate
ROUNDING = 24  # bytes for each weight of the tensor that is rounded: copies in groups, codes, distances
STREAMS = 2  # hidden states of the public examples: in the full model, and in the emulator
COPIES = 2  # float32 copies of a block while it is compressed: the full model's, and the draft


def wide_part(package: PaperPackage) -> int:
    """Returns the bytes of the full model that are in float32 at one time: one block, and all that lies in no block."""
    return FLOAT32 * (package.outline.outside + max(package.outline.block_parameters()))


def least_memory(package: PaperPackage) -> int:
    """Returns the bytes without which no job runs on a CPU: at the gate, beside the full model in its mapped files."""
    return wide_part(package) + package.in_memory


@dataclass(frozen=True)
class Coordinator:
    """The coordinator of a job with one emulator.

    Attributes:
      package: the emulator.
      full: work of the full model with the adapter.
      emulator: work of the emulator with the adapter.
      length: number of tokens of an example.
      physical: number of examples in one pass.
      scored: number of public examples of the acceptance test.
      sites: number of sites.
    """

    package: PaperPackage
    full: Trials
    emulator: Trials
    length: int
    physical: int
    scored: int
    sites: int

    @property
    def ends(self) -> int:
        """Bytes of the slots' blocks in float32."""
        inside = tuple(f"{path}." for path in self.package.slots)
        return FLOAT32 * sum(
            p.numel() for n, p in self.package.outline.model.named_parameters() if n.startswith(inside)
        )

    @property
    def calibration(self) -> int:
        """Bytes of the public examples' hidden states, where a compressor looks at them."""
        states = FLOAT32 * CALIBRATION_EXAMPLES * self.length * self.package.outline.width
        return STREAMS * states if self.package.calibrated else 0

    @property
    def rounding(self) -> int:
        """Bytes that the rounding of the largest tensor takes."""
        return ROUNDING * max(parameter.numel() for parameter in self.package.outline.model.parameters())

    def build(self, profile: DeviceProfile | None) -> Phase:
        """Counts what lies in no block, one block being compressed, and the largest rounding.

        The full model stays in its mapped files, whose pages are given back, and is not counted.
        """
        block = (1 + COPIES) * FLOAT32 * max(self.package.outline.block_parameters())
        memory = FLOAT32 * self.package.outline.outside + max(block + self.calibration, self.rounding)
        return Phase("build", memory, self._build_seconds(profile), "compress the middle, write the package")

    def streamed(self) -> int:
        """Counts `offsite emulator build`, which reads the full model block by block: peak over the imports.

        While the package is written: the weights outside the blocks in float32, one block being compressed, and the
        largest rounding. At the gate: the emulator in float32, the weights outside, the ends and one block.
        """
        outside = FLOAT32 * self.package.outline.outside
        block = FLOAT32 * max(self.package.outline.block_parameters())
        writing = outside + max((1 + COPIES) * block + self.calibration, self.rounding)
        opened = max(self.package.bytes + DECODED * self.package.largest, round(HEAP * self.full.step.peak))
        return max(writing, outside + self.package.widened + 2 * self.ends + block + opened)

    def gate(self, profile: DeviceProfile | None) -> Phase:
        """Counts the wide part of the full model, the emulator as it is stored, and the larger of what follows.

        One tensor being widened as the emulator is opened; a pass on two examples, with the slots in float32; one
        private step, as the clip is measured.
        """
        pair = self.ends + round(HEAP * self.full.step.peak * PAIR / self.physical)
        more = max(DECODED * self.package.largest, pair, round(HEAP * self.emulator.step.peak))
        each = self.full.step.times(GATE_EXAMPLES / self.physical)
        own = self.emulator.step.times((GATE_EXAMPLES + CLIP_EXAMPLES) / self.physical)
        memory = wide_part(self.package) + self.package.in_memory + more
        return Phase("gate", memory, seconds(each + own, profile), "compare gradients, measure the clip")

    def scores(self, profile: DeviceProfile | None) -> Phase:
        """Counts the wide part of the full model and one pass without gradients."""
        memory = wide_part(self.package) + round(HEAP * self.full.forward.peak)
        work = self.full.forward.times(self.scored / self.physical)
        return Phase("scores", memory, seconds(work, profile), "score the full model on public records")

    def plug_in(self, profile: DeviceProfile | None) -> Phase:
        """Counts the wide part of the full model, one pass, and the sites' masked updates."""
        upload = self.full.upload
        memory = wide_part(self.package) + round(HEAP * self.full.forward.peak)
        memory += (FIVE_FLOATS + FLOAT32 * self.sites) * upload
        time = seconds(self.full.forward.times(self.scored / self.physical), profile)
        if profile is not None and time is not None:
            time += upload * self.sites / profile.masking
        return Phase("plug-in", memory, time, "add the updates, score the tuned model, each round")

    def phases(self, profile: DeviceProfile | None) -> tuple[Phase, ...]:
        """Returns all phases in order."""
        return (self.build(profile), self.gate(profile), self.scores(profile), self.plug_in(profile))

    def _build_seconds(self, profile: DeviceProfile | None) -> float | None:
        if profile is None:
            return None
        weights = sum(count * sum(p.numel() for p in paper.block.parameters()) for paper, count in self.package.kept)
        fitted = any(text.startswith("gptq") for text in self.package.design.recipe)
        time = weights / (profile.fitting if fitted else profile.rounding)
        passes = Work()
        if self.package.calibrated:
            passes = self.full.forward.times(STREAMS * CALIBRATION_EXAMPLES / self.physical)
        reading = self.package.itemsize * self.package.outline.parameters / profile.reading
        return time + reading + (seconds(passes, profile) or 0.0)
