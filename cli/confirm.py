"""Confirmations at the terminal: fingerprints that people compared, and steps that are about to happen."""

from collections.abc import Mapping, Sequence

import typer

from offsite.errors import Untrusted
from offsite.trust.certificates import WARN_DAYS, digits_of


def confirm(question: str, *, yes: bool) -> None:
    """Asks a question, unless an option gave the answer.

    Raises:
      Untrusted: the answer is no, or there is nobody to ask.
    """
    if yes:
        return
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        typer.echo("", err=True)  # the cursor stands behind the question
        agreed = False
    if not agreed:
        raise Untrusted(f"answer=no to {question!r}; nothing was changed; a script gives the answer as an option")


def same_fingerprint(computed: Sequence[str], heard: Sequence[str]) -> None:
    """Compares fingerprints of files with the fingerprints that the other side read out, in any order.

    Raises:
      Untrusted: the fingerprints differ.
    """
    if sorted(map(digits_of, computed)) != sorted(map(digits_of, heard)):
        raise Untrusted(
            f"fingerprint={', '.join(computed)}: the other side read {', '.join(heard)}; nothing was changed; ask again"
        )


def warn_of_expiry(left: Mapping[str, int]) -> None:
    """Prints a line for everything that expires within a month."""
    for name, days in left.items():
        if days <= WARN_DAYS:
            typer.echo(f"warning: {name} expires in {days} days; offsite coordinator approve DIR renews it", err=True)
