"""What a prepared job needs beside its manifest and its packages when it is opened again: `job_facts.json`."""

from dataclasses import dataclass

from offsite.coordinator.job.score import Score


@dataclass(frozen=True)
class EmulatorScores:
    """What was measured of one emulator.

    Attributes:
      sites: names of the sites that get the emulator, sorted.
      gradient_cosine: result of the gate.
      public: score on public records before any training.
    """

    sites: tuple[str, ...]
    gradient_cosine: float
    public: Score


@dataclass(frozen=True)
class JobFacts:
    """What was measured while a job was prepared.

    Attributes:
      zero_shot: score of the full model on public records before any training.
      emulators: what was measured of each emulator, the default first.
    """

    zero_shot: Score
    emulators: tuple[EmulatorScores, ...]
