"""The file `job_facts.json`: measurements that an opened job needs beside its manifest and its packages."""

from dataclasses import dataclass

from offsite.coordinator.job.score import Score


@dataclass(frozen=True)
class EmulatorScores:
    """Measurements of one emulator.

    Attributes:
      sites: names of the sites that get the emulator, sorted.
      gradient_cosine: result of the gate, from -1 to 1.
      public: score on public records before any training.
    """

    sites: tuple[str, ...]
    gradient_cosine: float
    public: Score


@dataclass(frozen=True)
class JobFacts:
    """Measurements from the preparation of a job.

    Attributes:
      zero_shot: score of the full model on public records before any training.
      emulators: measurements of each emulator, the default first.
    """

    zero_shot: Score
    emulators: tuple[EmulatorScores, ...]
