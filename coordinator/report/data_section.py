"""The section of a report on the records that there were to learn from."""

from offsite.coordinator.report.data_facts import DataFacts
from offsite.coordinator.report.formatting import count
from offsite.coordinator.report.section import Section

HEAD = ("records", "read", "with nothing to learn", "targets")


def data(facts: tuple[DataFacts, ...]) -> Section:
    """Returns the section on the records of each file, with the reason of the first record that is left out."""
    rows = tuple((_words(own), count(own.records), count(own.left_out), count(own.targets)) for own in facts)
    meaning = (
        "A target is one thing that a record teaches, for example a token or a label. A record without a target counts "
        "as a record, and nothing is learnt from it."
    )
    return Section(
        "Records", (meaning, *(f"{line}." for own in facts for line in own.warnings)), HEAD, rows, numbers=True
    )


def _words(own: DataFacts) -> str:
    return f"{own.site}, {own.part}" if own.site else own.part
