"""The messages of a round and of its preparation, as plain frozen values."""

from dataclasses import dataclass

import numpy as np

from offsite.secagg.signed_bodies import Signed

NAME, LINE = 128, 1 << 10  # most characters of a name, and of a line for people
# Of a refresh: a bias for each block of the deepest towers, and more bytes than any honest refresh has.
MAX_BIASES, MAX_REFRESH_BYTES = 1 << 10, 1 << 24
# Of a job: a site computes for as long as an approved job says, and these are far beyond any job that ends.
MAX_TOKENS, MAX_STEPS = 1 << 20, 10**6


def printable(text: str, limit: int = LINE) -> str:
    """Returns somebody's text as one line of at most `limit` characters, which neither fills nor steers a screen."""
    line = "".join(character if character.isprintable() else " " for character in text[:limit])
    return line if len(text) <= limit else f"{line[:-3]}..."


def one_line(text: str, limit: int = LINE) -> str:
    """Returns a text as it may travel: like `printable`, in ASCII, with `?` for every other character."""
    return printable(text, limit).encode("ascii", "replace").decode()


@dataclass(frozen=True)
class TrainRequest:
    """Asks a site to train from an adapter.

    Attributes:
      job: digest of the job, 32 bytes.
      round: number of the round, from 1.
      adapter: adapter to start from, float32 (d,).
      refresh: the emulator's biases that moved, (name, values as float16 little endian), sorted by name; may be empty.
    """

    job: bytes
    round: int
    adapter: np.ndarray
    refresh: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True)
class TrainReply:
    """Reports that a site holds a finished update of a round; nothing about the data travels.

    Attributes:
      round: number of the round, from 1.
    """

    round: int


@dataclass(frozen=True)
class KeysRequest:
    """Opens the aggregation of a round's updates among the sites that finished training.

    Attributes:
      round: number of the training round, from 1.
      sequence: number of the aggregation, never repeated within an epoch.
      nonce: 32 random bytes of the coordinator.
      adapter: SHA-256 of the training's start, 32 bytes; see `secagg_params.adapter_digest`.
      invited: names of the sites that finished training, sorted.
    """

    round: int
    sequence: int
    nonce: bytes
    adapter: bytes
    invited: tuple[str, ...]


@dataclass(frozen=True)
class SignedBatch:
    """Several signed messages, in the order in which they were given.

    Attributes:
      messages: the signed messages.
    """

    messages: tuple[Signed, ...]


@dataclass(frozen=True)
class LedgerHead:
    """The newest entry of a site's privacy ledger.

    Attributes:
      ledger: SHA-256 of the data set's name, hexadecimal.
      count: number of entries.
      head: digest of the last entry, hexadecimal.
      signature: the coordinator's countersignature, 64 bytes; empty before it countersigned.
    """

    ledger: str
    count: int
    head: str
    signature: bytes = b""


@dataclass(frozen=True)
class MaskedReply:
    """A masked upload.

    Attributes:
      commitment: signed SHA-256 of the vector.
      vector: masked update, uint32 (d,).
      ledger: head of the site's ledger with this release; None in a simulation.
    """

    commitment: Signed
    vector: np.ndarray
    ledger: LedgerHead | None = None


@dataclass(frozen=True)
class UpdateRequest:
    """Asks for an unmasked update, in a job without secure aggregation.

    Attributes:
      opening: opening of the round; the same for all its sites.
      sealing: public X-Wing key of this attempt, 1216 bytes, to which the update is sealed.
    """

    opening: KeysRequest
    sealing: bytes


@dataclass(frozen=True)
class UpdateReply:
    """A sealed, unmasked update; see `protos.sealed_update`.

    Attributes:
      commitment: signed SHA-256 of the box.
      box: the update, sealed to the request's key.
      ledger: head of the site's ledger with this release; None in a simulation.
    """

    commitment: Signed
    box: bytes
    ledger: LedgerHead | None = None


@dataclass(frozen=True)
class Announcement:
    """The collector's list of survivors, as the members will sign it.

    Attributes:
      body: canonical bytes, see `secagg.signed_bodies.write_announcement`.
    """

    body: bytes


@dataclass(frozen=True)
class Refusal:
    """A site's refusal.

    Attributes:
      kind: name of the error.
      reason: one line without private data; a longer line is cut when it is encoded.
    """

    kind: str
    reason: str


@dataclass(frozen=True)
class Offer:
    """A job as the coordinator offers it to one site.

    Attributes:
      manifest: canonical bytes of the job manifest.
      manifest_signature: the coordinator's signature, 64 bytes.
      owners: (site, signature of the federation manifest), sorted by site.
      package: SHA-256 of the encrypted package, 32 bytes.
      package_bytes: size of the encrypted package in bytes.
      sealed_key: key of the package, sealed to this site.
      ledgers: heads of this site's ledgers that the coordinator countersigned.
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
    """A site's answer to an offer.

    Attributes:
      state: `fetching`, `waiting` for the owner, `ready` or `refused`.
      detail: one line without private data.
      fetched: bytes of the package that the site holds.
      owner_signature: the owner's signature of the federation manifest, 64 bytes; may be empty.
      ledger: head of the site's ledger, not countersigned; None without a ledger.
    """

    state: str
    detail: str
    fetched: int
    owner_signature: bytes
    ledger: LedgerHead | None = None


@dataclass(frozen=True)
class Notice:
    """Informs a site that a round was given up (`abort`) or a job is done (`finish`).

    Attributes:
      kind: `abort` or `finish`.
      reason: one line for people.
    """

    kind: str
    reason: str


@dataclass(frozen=True)
class SignedMessage:
    """One signed message between the coordinator and a site; see `protos.signed_messages` for the checks.

    Attributes:
      federation: SHA-256 of the federation manifest, 32 bytes.
      sender: a site's name, or "coordinator".
      recipient: a site's name, or "coordinator".
      stage: name of the stage.
      number: number of the message, unsigned 64-bit.
      body: an envelope.
      signature: the sender's Ed25519 signature over every field above; empty before signing.
    """

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
