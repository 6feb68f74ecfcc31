"""What is said in a round and before it, as plain frozen values."""

from dataclasses import dataclass

import numpy as np

NAME, LINE = 128, 1 << 10  # most characters of a name, and of what a person reads
# Of a refresh: a bias for each block of the deepest towers, and bytes that no honest one comes near.
MAX_BIASES, MAX_REFRESH_BYTES = 1 << 10, 1 << 24
# Of a job: a site computes for as long as an approved one says, and these are far beyond any that ends.
MAX_TOKENS, MAX_PHYSICAL_BATCH, MAX_STEPS = 1 << 20, 1 << 16, 10**6


def printable(text: str, most: int = LINE) -> str:
    """Returns what somebody wrote as one line of at most `most` characters, which neither fills nor steers a screen."""
    line = "".join(one if one.isprintable() else " " for one in text[:most])
    return line if len(text) <= most else f"{line[:-3]}..."


def one_line(text: str, most: int = LINE) -> str:
    """Returns a text as it may travel: as `printable`, in ASCII, with `?` for every other character."""
    return printable(text, most).encode("ascii", "replace").decode()


@dataclass(frozen=True)
class TrainRequest:
    """Asks a site to train from an adapter.

    Attributes:
      job: digest of the job, 32 bytes.
      round: from 1.
      adapter: float32 (d,).
      refresh: the emulator's biases that moved, (name, float16 little endian), by name; empty where none did.
    """

    job: bytes
    round: int
    adapter: np.ndarray
    refresh: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True)
class TrainReply:
    """Says that a site holds a finished update of a round; nothing about the data travels."""

    round: int


@dataclass(frozen=True)
class KeysRequest:
    """Opens the aggregation of a round's updates among the sites that finished training."""

    round: int
    sequence: int
    nonce: bytes
    adapter: bytes
    invited: tuple[str, ...]


@dataclass(frozen=True)
class SignedBytes:
    """A signed secure-aggregation message; body and signature pass through untouched."""

    sender: str
    body: bytes
    signature: bytes


@dataclass(frozen=True)
class SignedBatch:
    """Several signed messages, in the order in which they were given."""

    messages: tuple[SignedBytes, ...]


@dataclass(frozen=True)
class LedgerHead:
    """The newest entry of a site's privacy ledger.

    Attributes:
      ledger: SHA-256 of the data set's name, hexadecimal.
      count: entries.
      head: digest of the last, hexadecimal.
      signature: the coordinator's, where it countersigned; else empty.
    """

    ledger: str
    count: int
    head: str
    signature: bytes = b""


@dataclass(frozen=True)
class MaskedReply:
    """A signed commitment and the masked vector, uint32 of shape (d,)."""

    commitment: SignedBytes
    vector: np.ndarray
    ledger: LedgerHead | None = None


@dataclass(frozen=True)
class UpdateRequest:
    """Asks for an update as it is, in a job without secure aggregation.

    Attributes:
      opening: the round; the same for all its sites.
      sealing: public X-Wing key of this attempt, 1216 bytes, to which the update is sealed.
    """

    opening: KeysRequest
    sealing: bytes


@dataclass(frozen=True)
class UpdateReply:
    """A commitment to a box and the box, in which the update is as it is; see `protos.sealed_update`."""

    commitment: SignedBytes
    box: bytes
    ledger: LedgerHead | None = None


@dataclass(frozen=True)
class Announcement:
    """The collector's list of survivors, as the members will sign it."""

    body: bytes


@dataclass(frozen=True)
class Refusal:
    """A site's refusal: name of the error and one line without private data; longer ones are cut as they leave."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Offer:
    """A job as it is offered to one site.

    Attributes:
      manifest: canonical bytes of the job manifest.
      manifest_signature: the coordinator's, 64 bytes.
      owners: (site, signature of the federation manifest), sorted by site.
      package: SHA-256 of the encrypted package, 32 bytes.
      package_bytes: its size.
      sealed_key: its key, sealed to this site.
      ledgers: what the coordinator countersigned of this site's ledgers.
    """

    manifest: bytes
    manifest_signature: bytes
    owners: tuple[tuple[str, bytes], ...]
    package: bytes
    package_bytes: int
    sealed_key: bytes
    ledgers: tuple[LedgerHead, ...] = ()


@dataclass(frozen=True)
class OfferReply:
    """Where a site stands with an offer: `fetching`, `waiting` for its owner, `ready` or `refused`."""

    state: str
    detail: str
    fetched: int
    owner_signature: bytes
    ledger: LedgerHead | None = None


@dataclass(frozen=True)
class Notice:
    """Tells a site that a round was given up (`abort`) or a job is done (`finish`)."""

    kind: str
    reason: str


@dataclass(frozen=True)
class SignedMessage:
    """One signed message between the coordinator and a site; see `protos.letters` for what is checked."""

    federation: bytes
    sender: str
    recipient: str
    stage: str
    number: int
    body: bytes
    signature: bytes = b""


Message = (
    TrainRequest
    | TrainReply
    | KeysRequest
    | SignedBatch
    | MaskedReply
    | UpdateRequest
    | UpdateReply
    | Announcement
    | Refusal
    | Offer
    | OfferReply
    | Notice
)
