"""Writes the generated pages of docs/; `python -m tests.docs.generate --probe` also measures the methods again."""

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from tests import tree
from tests.docs import configuration, methods

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration.page,
    "methods.md": methods.page,
    "tree.md": tree.page,
}


def refresh(*, probe: bool) -> None:
    """Writes `cli/methods.json` anew.

    Args:
      probe: whether all methods are measured again; otherwise the numbers stay, a method without numbers is measured,
        and the words come from the code.
    """
    from offsite.adapter.methods import METHODS
    from offsite.cli import method_probe
    from offsite.cli.method_table import read_table, write_tables

    warnings.simplefilter("ignore")  # of speed and of hooks
    logging.disable(logging.WARNING)
    tables = []
    for family in method_probe.FAMILIES:
        kept = {} if probe else {finding.method: finding for finding in read_table(family).usable}
        findings = {method: kept.get(method) or method_probe.probe(method, family) for method in METHODS}
        tables.append(method_probe.described(family, findings))
    write_tables(tables)


def main() -> None:
    """Writes the table of methods, and then every generated page."""
    refresh(probe="--probe" in sys.argv[1:])
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
