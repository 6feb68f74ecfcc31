"""The named exceptions of offsite, all on one page.

Each carries one line for the person at the terminal: `name=value`, the rule, the next step. `cli` prints that line and
exits with code 2. Anything that is not an `OffsiteError` is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class OffsiteError(Exception):
    """Something that the person at the terminal, or the peer, has to change."""


class ConfigError(OffsiteError):
    """A configuration value is missing, unknown or out of range.

    Args:
      message: the line for the person at the terminal.
      key: path of the key at fault in its document, with dots; empty where no single key is at fault.
    """

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class CheckFailed(OffsiteError):
    """Several things are wrong at once, which a check before any work found; each line of the message is one finding.

    The other exceptions stop at the first fault. Here a person mends all of them before the next try.
    """


class UnknownName(OffsiteError):
    """A name is not in the table in which it was looked up."""


class DataError(OffsiteError):
    """A data file is missing, empty, or not in the shape that was announced."""


class UnsupportedModel(OffsiteError):
    """A model's structure or weights do not allow what was asked."""


class DigestMismatch(OffsiteError):
    """A file or message does not have the SHA-256 that was announced."""


class RangeError(OffsiteError):
    """A number is not finite, or outside the range that was agreed."""


class PrivacyRefusal(OffsiteError):
    """Going on would release something without the privacy that was promised."""


class TrainingFault(OffsiteError):
    """The machine or the model fails whatever the records are; going on would train on noise alone."""


class PolicyRefusal(OffsiteError):
    """The data owner's own policy does not permit what was asked."""


class Untrusted(OffsiteError):
    """A key, certificate, signature or manifest differs from what was agreed on."""


class ProtocolViolation(OffsiteError):
    """A peer broke a rule of secure aggregation; nothing secret was answered."""


class TooFewSurvivors(OffsiteError):
    """Fewer sites answered than the threshold; the round has no sum."""


class MalformedMessage(OffsiteError):
    """Bytes from the wire do not decode to a message of this version."""


def nearest(name: str, names: Mapping[str, object] | list[str]) -> str:
    """Returns a hint that names the closest known names, or lists all of them."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(close)}" if close else f"known: {', '.join(known)}"


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """Returns the entry of a table, by a name that may come from a file or the network.

    Args:
      table: the visible table of a seam, for example `adapter.methods.METHODS`.
      name: key to look up.
      what: singular noun for the table's entries, for the message.

    Raises:
      UnknownName: the table has no such entry; the message names the nearest.
    """
    if name not in table:
        raise UnknownName(f"{what}={name!r} is not known; {nearest(name, dict(table))}")
    return table[name]
