"""What people confirm at the terminal: fingerprints they compared, and what is about to happen."""

from collections.abc import Mapping, Sequence

import typer

from offsite.errors import Untrusted
from offsite.trust.certificates import WARN_DAYS


def confirm(question: str, *, yes: bool) -> None:
    """Asks, unless the answer was given as an option.

    Raises:
      Untrusted: the answer is no, or there is nobody to ask.
    """
    if yes:
        return
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        agreed = False
    if not agreed:
        raise Untrusted(f"answer=no to {question!r}; nothing was changed; a script gives the answer as an option")


def same_fingerprint(found: Sequence[str], told: Sequence[str]) -> None:
    """Compares fingerprints with those that the other side told, in any order.

    Raises:
      Untrusted: they differ.
    """
    if sorted(map(_digits, found)) != sorted(map(_digits, told)):
        raise Untrusted(f"fingerprint={', '.join(found)}: told were {', '.join(told)}; nothing was changed; ask again")


def warn_of_expiry(left: Mapping[str, int]) -> None:
    """Prints a line for everything that expires within a month."""
    for what, days in left.items():
        if days <= WARN_DAYS:
            typer.echo(f"warning: {what} expires in {days} days; offsite coordinator approve DIR renews it", err=True)


def _digits(fingerprint: str) -> str:
    return "".join(fingerprint.split()).replace("-", "").lower()
