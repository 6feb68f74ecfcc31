"""What a refusal says to whom: the owner gets the reason, the coordinator one constant sentence for each kind.

A reason may follow from a record, from what other jobs spent, or from the owner's folders. So no text that an exception
carries crosses the wire: `for_peer` lets through the sentences of this file and nothing else.
"""

import dataclasses
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from offsite.privacy.faults import is_memory
from offsite.protos import codec

NO_MEMORY = "not enough memory for this job; raise max_memory_gb in policy.toml, or ask for a smaller physical_batch"
FAULT, REFUSED = "Fault", "refused"
_OWNER = "the site's owner sees why in the site's log"
REFUSALS: Mapping[str, str] = MappingProxyType(
    {
        "ConfigError": f"a setting of this site does not fit; {_OWNER}",
        "CheckFailed": f"something at this site has to be put right first; {_OWNER}",
        "UnknownName": "this site's release does not know a name in the job or message; install the same release",
        "DataError": f"this site cannot read or write its files, or its data do not fit this job; {_OWNER}",
        "UnsupportedModel": f"the emulator did not pass this site's checks; {_OWNER}",
        "DigestMismatch": f"bytes have another SHA-256 than was announced; {_OWNER}",
        "RangeError": f"a number is outside the range that this site accepts; {_OWNER}",
        "PrivacyRefusal": f"this site's privacy terms or its ledger do not allow this; {_OWNER}",
        "TrainingFault": f"training cannot run on this site's machine; {_OWNER}",
        "PolicyRefusal": f"this site's owner does not permit this; {_OWNER}",
        "Untrusted": f"a key, a signature or signed terms differ from what the owners agreed on; {_OWNER}",
        "ProtocolViolation": f"the message breaks a rule of the protocol, or is not due now; {_OWNER}",
        "TooFewSurvivors": f"too few sites are left for a sum; {_OWNER}",
        "MalformedMessage": f"the bytes are no message of this version; {_OWNER}",
        FAULT: "a fault in the site's program; the site's log tells its owner where",
    }
)
NOT_SIGNED = "signatures of owners under the federation manifest are missing"
NOT_APPROVED = "the data owner has not approved this job yet"
READS_DATA = "approved, its data are read"
DETAILS = frozenset({"", NOT_SIGNED, NOT_APPROVED, READS_DATA})


def for_peer(message: codec.Message) -> codec.Message:
    """Returns an answer as the coordinator may read it: its texts are constants of this file."""
    if isinstance(message, codec.Refusal):
        return _refusal(message.kind, message.reason)
    if not isinstance(message, codec.OfferReply):
        return message
    detail = message.detail if message.detail in DETAILS else ""
    if message.state == REFUSED:
        kind, _, reason = message.detail.partition(": ")
        told = _refusal(kind, reason)
        detail = f"{told.kind}: {told.reason}"
    return dataclasses.replace(message, detail=detail)


def _refusal(kind: str, reason: str) -> codec.Refusal:
    known = kind if kind in REFUSALS else FAULT
    return codec.Refusal(known, NO_MEMORY if (kind, reason) == (FAULT, NO_MEMORY) else REFUSALS[known])


def local_message(error: BaseException) -> str:
    """Returns the line of the site's own log about an error that is not an `OffsiteError`.

    The line never holds the error's message, which could quote a record.
    """
    if is_memory(error):
        return NO_MEMORY
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"
    return f"a fault in the site's program at {place}; see its log"
