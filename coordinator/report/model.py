"""The report of a job as one frozen value, the same for a simulation and for a job between organisations."""

from collections.abc import Mapping
from dataclasses import dataclass

from offsite.adapter.options import Scalar
from offsite.coordinator.job.round_record import Dropped, RoundRecord
from offsite.coordinator.report.data_facts import DataFacts
from offsite.coordinator.report.emulator_facts import EmulatorFacts
from offsite.coordinator.report.privacy_facts import PrivacyFacts
from offsite.coordinator.report.quality_facts import Quality

SIMULATION, FEDERATION = "simulation", "federation"


@dataclass(frozen=True)
class AdapterFacts:
    """The adapter of a job.

    Attributes:
      method: name of the adapter method.
      rank, alpha, targets, options: settings of the method.
      slots: paths of the blocks that carry the adapter.
      parameters: number of trained numbers.
      exact_mean: whether the mean of the sites' adapters is the mean of their effects.
      why: reason why the mean is exact, or is not.
      peft: whether Hugging Face PEFT loads the adapter.
      directory: folder of the adapter inside the run folder.
    """

    method: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    slots: tuple[str, ...]
    parameters: int
    exact_mean: bool
    why: str
    options: Mapping[str, Scalar]
    peft: bool
    directory: str


@dataclass(frozen=True)
class RuleFacts:
    """The server rule of a job.

    Attributes:
      rule: name of the rule.
      needs: uploads that the rule needs: the mean, or each site's own.
      linear: whether the rule's result is linear in an upload.
      why: reason why the result is linear, or is not.
    """

    rule: str
    needs: str
    linear: bool
    why: str


@dataclass(frozen=True)
class DroppedInRound(Dropped):
    """A site that dropped out of a round, with the number of the round, from 1."""

    round: int


@dataclass(frozen=True)
class SecaggFacts:
    """The secure aggregation of a job.

    Attributes:
      enabled: whether the coordinator saw sums only.
      suite: number of the protocol's suite of algorithms.
      members: sites whose updates count in the last round.
      threshold: smallest number of members of the last round.
      accomplices: number of sites that may help the coordinator without any other site's update being open to it.
      sites: number of all sites of the federation.
      dropped: all sites that dropped out of a round.
      upload_bytes: bytes of the largest upload.
      payload_bytes: bytes of one update as plain 32-bit numbers.
      rounds: number of whole rounds.
    """

    enabled: bool
    suite: int
    members: tuple[str, ...]
    threshold: int
    accomplices: int
    sites: int
    dropped: tuple[DroppedInRound, ...]
    upload_bytes: int
    payload_bytes: int
    rounds: int


@dataclass(frozen=True)
class PhaseCost:
    """The cost of one phase of a run.

    Attributes:
      bytes_up: bytes from all sites.
      bytes_down: bytes to all sites.
      seconds: duration of the phase.
      peak_rss_bytes: peak resident memory of the process, in bytes.
    """

    bytes_up: int
    bytes_down: int
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Provenance:
    """The origin of a report's numbers.

    Attributes:
      seed: seed of the federation file.
      config_sha256: SHA-256 of the federation file, hexadecimal.
      model_sha256: SHA-256 over the model's weight files, hexadecimal.
      job_sha256: SHA-256 of the job's manifest, hexadecimal.
      versions: versions of the installed packages, by name.
      started: wall clock at the start of the run, ISO 8601.
      platform: operating system and processor.
    """

    seed: int
    config_sha256: str
    model_sha256: str
    job_sha256: str
    versions: Mapping[str, str]
    started: str
    platform: str


@dataclass(frozen=True)
class Report:
    """One job from its first to its last round.

    A number that the coordinator cannot know is None; `privacy.not_known_here` says so in words.

    Attributes:
      mode: SIMULATION, or FEDERATION for a job between organisations.
      engine: carrier of the rounds: "memory" or "flower" in a simulation, "superlink" between organisations.
      rounds_planned: number of rounds of the job.
      finished_rounds: number of whole rounds.
      quality: scores of the models.
      emulators: emulators that the sites got.
      adapter: the trained adapter.
      privacy: privacy promise to each record.
      aggregation: the server rule.
      secagg: secure aggregation of the job.
      rounds: records of the whole rounds, in order.
      cost: cost of each phase by name; None where no cost was measured.
      warnings: sentences that a reader must not miss.
      provenance: seed, hashes and versions.
      data: numbers of records and targets of each file; of the public file alone between organisations, and () in a
        report of an earlier release.
    """

    mode: str
    engine: str
    rounds_planned: int
    finished_rounds: int
    quality: Quality
    emulators: EmulatorFacts
    adapter: AdapterFacts
    privacy: PrivacyFacts
    aggregation: RuleFacts
    secagg: SecaggFacts
    rounds: tuple[RoundRecord, ...]
    cost: Mapping[str, PhaseCost] | None
    warnings: tuple[str, ...]
    provenance: Provenance
    data: tuple[DataFacts, ...] = ()

    @property
    def simulated(self) -> bool:
        """Whether the job was a simulation, in which one process held everything."""
        return self.mode == SIMULATION

    @property
    def accepted(self) -> tuple[RoundRecord, ...]:
        """The rounds that were taken over."""
        return tuple(record for record in self.rounds if record.accepted)

    @property
    def refused(self) -> tuple[RoundRecord, ...]:
        """The rounds that were not taken over."""
        return tuple(record for record in self.rounds if not record.accepted)
