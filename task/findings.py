"""Findings of a check: everything that is wrong, and everything that a person should know, gathered in order."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from offsite.errors import CheckFailed, OffsiteError


@dataclass
class Findings:
    """The findings so far; each is one line.

    Attributes:
      errors: lines on faults, after which no work may begin.
      warnings: lines that a person should know.
      on_step: function that takes what is being checked, since a large file takes its time.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    on_step: Callable[[str], None] = lambda text: None

    @contextmanager
    def gathering(self, where: str = "") -> Iterator[None]:
        """Turns an error inside the `with` statement into a finding; the check goes on behind the statement.

        Args:
          where: words in front of the line, for example `site=north`; empty for no words.
        """
        try:
            yield
        except CheckFailed as error:
            for line in str(error).splitlines():
                self.add(line, where)
        except OffsiteError as error:
            self.add(str(error), where)
        except OSError as error:
            self.add(f"path={error.filename}: {error.strerror or error}; put this right first", where)

    def add(self, line: str, where: str = "") -> None:
        """Adds a fault; the same line counts once."""
        line = f"{where}: {line}" if where else line
        if line not in self.errors:
            self.errors.append(line)

    def warn(self, line: str, where: str = "") -> None:
        """Adds a warning; the same line counts once."""
        line = f"{where}: {line}" if where else line
        if line not in self.warnings:
            self.warnings.append(line)

    def check(self) -> None:
        """Raises all faults at once.

        Raises:
          CheckFailed: there is a fault.
        """
        if self.errors:
            raise CheckFailed("\n".join(self.errors))
