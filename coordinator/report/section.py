"""One section of a report: sentences, a table of rounded numbers, and the plot that belongs to it."""

from dataclasses import dataclass

Rows = tuple[tuple[str, ...], ...]
FACTS = ("fact", "value")
"""Column names of a table that has one fact in each row."""


@dataclass(frozen=True)
class Section:
    """One heading, with the paragraphs, the table and the plot below.

    Attributes:
      heading: words of the heading.
      text: paragraphs before the table.
      head: column names.
      rows: rows of the table, each with one cell per column name.
      plot: key of the section's plot; empty without a plot.
      numbers: whether all columns but the first hold numbers.
    """

    heading: str
    text: tuple[str, ...]
    head: tuple[str, ...] = ()
    rows: Rows = ()
    plot: str = ""
    numbers: bool = False
