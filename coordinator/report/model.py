"""The report of a job as one frozen value, for a simulation and for a job between organisations alike."""

from collections.abc import Mapping
from dataclasses import dataclass

from offsite.adapter.options import Scalar
from offsite.coordinator.job.round_record import Dropped, RoundRecord
from offsite.coordinator.report.emulator_facts import EmulatorFacts
from offsite.coordinator.report.privacy_facts import PrivacyFacts
from offsite.coordinator.report.quality_facts import Quality

SIMULATION, FEDERATION = "simulation", "federation"


@dataclass(frozen=True)
class AdapterFacts:
    """What was trained.

    Attributes:
      method: name of the adapter method.
      rank, alpha, targets, options: settings of the method.
      slots: blocks that carry the adapter.
      parameters: count of trained numbers.
      exact_mean: whether the mean of the sites' adapters is the mean of their effects.
      why: reason for that.
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
    """The server rule: its name, what it needs of the sites, whether it is linear in an upload, and why."""

    rule: str
    needs: str
    linear: bool
    why: str


@dataclass(frozen=True)
class DroppedInRound(Dropped):
    """A site that dropped out of a round, with the number of the round."""

    round: int


@dataclass(frozen=True)
class SecaggFacts:
    """Secure aggregation over the job.

    Attributes:
      enabled: whether the coordinator saw sums only.
      suite: number of the protocol's suite of algorithms.
      members: sites of the last round.
      threshold: fewest members of the last round.
      dropped: all sites that dropped out of a round.
      upload_bytes: bytes of the largest upload.
      payload_bytes: bytes of one update as plain 32-bit numbers.
      rounds: count of whole rounds.
    """

    enabled: bool
    suite: int
    members: tuple[str, ...]
    threshold: int
    dropped: tuple[DroppedInRound, ...]
    upload_bytes: int
    payload_bytes: int
    rounds: int


@dataclass(frozen=True)
class PhaseCost:
    """Cost of one phase: bytes from and to all sites, seconds, peak resident memory in bytes."""

    bytes_up: int
    bytes_down: int
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Provenance:
    """Where the numbers come from.

    Attributes:
      seed: of the federation file.
      config_sha256: of the federation file.
      model_sha256: of the model's weight files.
      job_sha256: of the job's manifest.
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

    What the coordinator cannot know is None; `privacy.not_known_here` says so in words.

    Attributes:
      mode: SIMULATION, or FEDERATION for a job between organisations.
      engine: what carried the rounds: "memory" or "flower" in a simulation, "superlink" between organisations.
      rounds_planned: rounds of the job.
      finished_rounds: whole rounds.
      quality: scores of the models.
      emulators: what the sites were given.
      adapter: what was trained.
      privacy: what is promised to each record.
      aggregation: the server rule.
      secagg: how the updates were added.
      rounds: record of each whole round.
      cost: cost of each phase by name; None where it was not measured.
      warnings: sentences on what a reader must not miss.
      provenance: seed, hashes and versions.
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

    @property
    def simulated(self) -> bool:
        """Whether one process held everything."""
        return self.mode == SIMULATION

    @property
    def accepted(self) -> tuple[RoundRecord, ...]:
        """The rounds that were taken over."""
        return tuple(record for record in self.rounds if record.accepted)

    @property
    def refused(self) -> tuple[RoundRecord, ...]:
        """The rounds that were not taken over."""
        return tuple(record for record in self.rounds if not record.accepted)
