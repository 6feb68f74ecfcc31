"""A site's four private keys, made at the site; they never leave their folder."""

import shutil
from base64 import b64decode, b64encode
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from offsite.errors import ConfigError, Untrusted
from offsite.trust import certificates
from offsite.trust.files import make_private, read_private, write_new
from offsite.trust.identity import Identity
from offsite.trust.sealing import SealingKey

IDENTITY, SEALING, TLS, NODE = "identity.key", "sealing.key", "tls.key", "node.key"
_NODE_KIND = "ecdsa-sha2-nistp384 "
_NODE_HEADER = b"\0\0\0\x13ecdsa-sha2-nistp384\0\0\0\x08nistp384\0\0\0\x61"  # RFC 5656, section 3.1
_FAILURES = (ValueError, TypeError, UnsupportedAlgorithm)


@dataclass(frozen=True)
class SiteKeys:
    """The keys of one site.

    Attributes:
      identity: Ed25519 key that signs everything the site sends.
      sealing: key that opens what is sealed to this site alone.
      tls: path of the P-256 key of the site's client certificate, PKCS8 in PEM.
      node: path of the P-384 key under which Flower knows the site, OpenSSH format.
    """

    identity: Identity
    sealing: SealingKey
    tls: Path
    node: Path

    @classmethod
    def create(cls, folder: Path, suite: int) -> "SiteKeys":
        """Makes new keys in a new folder; all four or none.

        Raises:
          ConfigError: the folder exists already; keys are never overwritten.
          DataError: the disk is full.
        """
        if folder.exists():
            raise ConfigError(
                f"keys={str(folder)!r} exists; keys are never overwritten; choose another folder, or rotate"
            )
        making = folder.with_name(folder.name + ".making")
        shutil.rmtree(making, ignore_errors=True)  # left by a crash; nobody ever saw these keys
        make_private(making)
        node = ec.generate_private_key(ec.SECP384R1())
        write_new(making / IDENTITY, Identity.generate().to_bytes())
        write_new(making / SEALING, SealingKey.generate(suite).to_bytes())
        write_new(making / TLS, certificates.new_key())
        write_new(making / NODE, node.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        making.rename(folder)
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> "SiteKeys":
        """Reads the keys.

        Raises:
          DataError: a file is missing.
          Untrusted: a file is damaged, or users other than its owner can read it.
        """
        raw = {name: read_private(folder / name) for name in (IDENTITY, SEALING, TLS, NODE)}
        try:
            identity = Identity.from_bytes(raw[IDENTITY])
        except ConfigError as error:
            raise Untrusted(f"path={str(folder / IDENTITY)!r} is damaged; restore it or rotate") from error
        certificates.read_key(raw[TLS])
        keys = cls(identity, SealingKey.from_bytes(raw[SEALING]), folder / TLS, folder / NODE)
        keys.node_public()
        return keys

    def node_public(self) -> str:
        """Returns the public half of the node key, one OpenSSH line.

        Raises:
          Untrusted: the file is damaged.
        """
        try:
            key = load_ssh_private_key(read_private(self.node), None)
        except _FAILURES as error:
            raise Untrusted(f"path={str(self.node)!r} is damaged; restore it or rotate") from error
        return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()

    def tls_public(self) -> str:
        """Returns the SHA-256 of the public half of the TLS key, hexadecimal."""
        return certificates.key_digest(certificates.read_key(read_private(self.tls)).public_key())


def check_node_public(line: str) -> None:
    """Checks that a text is a P-384 public key, one OpenSSH line without a comment.

    Raises:
      Untrusted: the text is something else.
    """
    try:
        point = b64decode(line.removeprefix(_NODE_KIND), validate=True).removeprefix(_NODE_HEADER)
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), point)
    except ValueError as error:
        raise Untrusted("a node key does not parse as a P-384 OpenSSH line; ask for a new request") from error
    # read by hand: cryptography's reader of OpenSSH lines knows many kinds and fails in many ways
    whole = _NODE_HEADER + key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    if line != _NODE_KIND + b64encode(whole).decode():
        raise Untrusted("a node key is not a plain P-384 OpenSSH line; ask for a new request")
