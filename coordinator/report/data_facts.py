"""What there was to learn from: the records of each file of a job, and those that came to nothing."""

from dataclasses import dataclass

from offsite.task.nothing_to_learn import Learnt


@dataclass(frozen=True)
class DataFacts:
    """The records of one file.

    Attributes:
      part: PUBLIC, TRAINING or HELD_OUT of `task.nothing_to_learn`.
      site: name of the site that holds the file; empty for the coordinator.
      records: number of records.
      left_out: number of records that have nothing to learn from.
      targets: number of targets of all records.
      first: place of the first record that is left out, and the reason; empty where no record is left out.
      passed_over: line about files of a folder that are no records; empty where there is none.
    """

    part: str
    site: str
    records: int
    left_out: int
    targets: int
    first: str = ""
    passed_over: str = ""

    @classmethod
    def of(cls, part: str, site: str, learnt: Learnt, passed_over: str) -> "DataFacts":
        """Returns the facts of one file."""
        return cls(part, site, learnt.records, learnt.left_out, learnt.targets, learnt.first, passed_over)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The sentences on the records that are left out, and on files that are no records."""
        whose = f"site={self.site} {self.part} data" if self.site else f"{self.part} data"
        outcome = str(Learnt(self.records, self.left_out, self.targets, self.first)) if self.left_out else ""
        return tuple(f"{whose}: {line}" for line in (outcome, self.passed_over) if line)
