"""Certificates of the coordinator's own authority, of its server and, by request, of each site; all on P-256.

TLS keeps strangers out. Who wrote a message is proved by its Ed25519 signature and never by a certificate.
"""

import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from offsite.errors import Untrusted
from offsite.trust.addresses import address_of

DAYS, AUTHORITY_DAYS, WARN_DAYS = 365, 3650, 30
EARLY = timedelta(hours=1)  # a site's clock may be behind
_FAILURES = (
    *(ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature),
    *(x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType),
)


class Authority:
    """The coordinator's certificate authority: a certificate that all sites pin, and a key that `repr` hides."""

    __slots__ = ("_key", "certificate")

    def __init__(self, certificate: bytes, key: bytes) -> None:
        self.certificate = certificate
        self._key = read_key(key)

    def key_pem(self) -> bytes:
        """Returns the private key in PKCS8, for a file that only the coordinator can read."""
        return key_pem(self._key)

    def issue(self, builder: x509.CertificateBuilder) -> bytes:
        """Returns a signed certificate in PEM."""
        issuer = read_certificate(self.certificate, "authority")
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        signed = builder.issuer_name(issuer.subject).add_extension(identifier, critical=False)
        return signed.sign(self._key, SHA256()).public_bytes(Encoding.PEM)

    def __repr__(self) -> str:
        return "Authority(key=***)"


def new_key() -> bytes:
    """Returns a fresh P-256 private key, PKCS8 in PEM."""
    return key_pem(ec.generate_private_key(ec.SECP256R1()))


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Returns a private key as PKCS8 in PEM, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Returns the P-256 private key of a PEM file's bytes.

    Raises:
      Untrusted: the bytes are no P-256 private key.
    """
    try:
        key = load_pem_private_key(pem, None)
    except _FAILURES as error:
        raise Untrusted("a TLS key does not parse; restore the file or rotate") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Untrusted("a TLS key is not on P-256; restore the file or rotate")
    return key


def create_authority(name: str, *, now: datetime, days: int = AUTHORITY_DAYS) -> Authority:
    """Returns a new authority that can sign end certificates only, valid for `days` from `now`."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(name, key.public_key(), now, days).issuer_name(_name(name))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(authority=True), critical=True)
    return Authority(builder.sign(key, SHA256()).public_bytes(Encoding.PEM), key_pem(key))


def issue_server(ca: Authority, key: bytes, hosts: Sequence[str], *, now: datetime, days: int = DAYS) -> bytes:
    """Returns the coordinator's certificate for these host names and addresses; `key` is its private key in PEM."""
    builder = _end("coordinator", read_key(key).public_key(), now, days, ExtendedKeyUsageOID.SERVER_AUTH)
    return ca.issue(builder.add_extension(x509.SubjectAlternativeName(_names(hosts)), critical=False))


def is_for(pem: bytes, hosts: Sequence[str]) -> bool:
    """Whether a server's certificate is for exactly these host names and addresses."""
    extensions = read_certificate(pem, "server certificate").extensions
    stored = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return list(stored) == _names(hosts)


def make_request(key: bytes, site: str) -> bytes:
    """Returns a certificate request in PEM: a site's name and public key, signed by the private key (PEM)."""
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(site)).sign(read_key(key), SHA256())
    return request.public_bytes(Encoding.PEM)


def issue_client(ca: Authority, csr_pem: bytes, site: str, *, now: datetime, days: int = DAYS) -> bytes:
    """Returns a site's certificate, valid for client authentication only.

    Only the name and the key are taken from the request.

    Raises:
      Untrusted: see `request_key`.
    """
    return ca.issue(_end(site, request_key(csr_pem, site), now, days, ExtendedKeyUsageOID.CLIENT_AUTH))


def request_key(csr_pem: bytes, site: str) -> ec.EllipticCurvePublicKey:
    """Returns the public key of a certificate request.

    Raises:
      Untrusted: the request does not parse, is not signed by its own key, names another site, or has no P-256 key.
    """
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        key, signed, name = request.public_key(), request.is_signature_valid, request.subject
    except _FAILURES as error:
        raise Untrusted(f"site={site!r}: its certificate request does not parse; ask for a new request") from error
    if not signed or name != _name(site):
        raise Untrusted(f"site={site!r}: its certificate request is not signed by its key for this name; ask again")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Untrusted(f"site={site!r}: its certificate request has no P-256 key; ask for a new request")
    return key


def key_digest(key: ec.EllipticCurvePublicKey) -> str:
    """Returns the SHA-256 of a public key (DER, SubjectPublicKeyInfo), hexadecimal."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def certificate_key(pem: bytes) -> str:
    """Returns the `key_digest` of a certificate's public key.

    Raises:
      Untrusted: the bytes are no certificate, or the certificate's key is not on an elliptic curve.
    """
    key = read_certificate(pem, "certificate").public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise Untrusted("a certificate has no elliptic-curve key; only the federation's own are known here")
    return key_digest(key)


def read_certificate(pem: bytes, what: str) -> x509.Certificate:
    """Returns a certificate from PEM.

    Raises:
      Untrusted: the bytes do not parse.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except _FAILURES as error:
        raise Untrusted(f"{what} does not parse as a certificate; ask for it again") from error


def check_issued(pem: bytes, ca: bytes, what: str) -> None:
    """Checks that the authority signed a certificate.

    Raises:
      Untrusted: another authority signed the certificate, or nobody did.
    """
    try:
        read_certificate(pem, what).verify_directly_issued_by(read_certificate(ca, "authority"))
    except _FAILURES as error:
        raise Untrusted(f"{what} was not issued by the pinned authority; ask the coordinator for a welcome") from error


def check_valid(pem: bytes, now: datetime, what: str) -> int:
    """Checks a certificate's dates.

    Returns:
      Whole days left; at `WARN_DAYS` and below, warn the person at the terminal.

    Raises:
      Untrusted: the certificate is expired or not yet valid; the message names both dates.
    """
    certificate = read_certificate(pem, what)
    return check_dates(certificate.not_valid_before_utc, certificate.not_valid_after_utc, now, what)


def check_dates(since: datetime, until: datetime, now: datetime, what: str) -> int:
    """Checks that `now` is in [since, until); see `check_valid`."""
    if not since <= now < until:
        state = "not yet valid" if now < since else "expired"
        raise Untrusted(
            f"{what} is {state}: valid {since:%Y-%m-%d %H:%M} to {until:%Y-%m-%d %H:%M} UTC, it is now "
            f"{now:%Y-%m-%d %H:%M}; check the clock, or have the coordinator renew it"
        )
    return (until - now).days


def fingerprint(data: bytes) -> str:
    """Returns the SHA-256 of some bytes as 16 groups of 4 hexadecimal digits, which two people compare by telephone."""
    digits = hashlib.sha256(data).hexdigest()
    return "-".join(digits[i : i + 4] for i in range(0, len(digits), 4))


def digits_of(fingerprint: str) -> str:
    """Returns the digits of a fingerprint as a person may have typed it, without its groups."""
    return "".join(fingerprint.split()).replace("-", "").lower()


def _builder(name: str, key: ec.EllipticCurvePublicKey, now: datetime, days: int) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _end(
    name: str, key: ec.EllipticCurvePublicKey, now: datetime, days: int, purpose: x509.ObjectIdentifier
) -> x509.CertificateBuilder:
    builder = _builder(name, key, now, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(authority=False), critical=True)
    return builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    addresses = [address_of(host) for host in hosts]
    return [x509.IPAddress(own) if own else x509.DNSName(host) for own, host in zip(addresses, hosts, strict=True)]
