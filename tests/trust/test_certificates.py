"""Certificates in real TLS handshakes of the standard library's ssl, and their dates."""

import base64
import itertools
import re
import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from offsite.errors import Untrusted
from offsite.trust import certificates as room

NOW = datetime.now(UTC).replace(microsecond=0)  # a TLS handshake looks at the machine's own clock


@pytest.fixture(scope="module")
def issued(tmp_path_factory):
    """Writes an authority's server and clients, and a stranger's of the same names."""
    folder = tmp_path_factory.mktemp("pki")
    for owner in ("ours", "theirs"):
        ca, key = room.create_authority("demo", now=NOW), room.new_key()
        (folder / f"{owner}-ca.pem").write_bytes(ca.certificate)
        write(folder, f"{owner}-server", room.issue_server(ca, key, ["localhost", "127.0.0.1"], now=NOW), key)
        for name, now in (("client", NOW), ("old", NOW - timedelta(days=400)), ("early", NOW + timedelta(days=2))):
            key = room.new_key()
            pem = room.issue_client(ca, room.make_request(key, "north"), "north", now=now)
            write(folder, f"{owner}-{name}", pem, key)
    return folder


def write(folder, name, certificate, key):
    (folder / f"{name}.pem").write_bytes(certificate + key)


def handshake(folder, *, client, server="ours-server", trusts="ours", host="localhost"):
    """Runs a mutual TLS handshake in memory, reads one byte, and returns the name the server saw."""
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.load_cert_chain(folder / f"{server}.pem")
    there.load_verify_locations(folder / "ours-ca.pem")
    there.verify_mode = ssl.CERT_REQUIRED
    here = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    here.load_verify_locations(folder / f"{trusts}-ca.pem")
    if client:
        here.load_cert_chain(folder / f"{client}.pem")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    left = here.wrap_bio(down, up, server_hostname=host)
    right = there.wrap_bio(up, down, server_side=True)
    waiting = [left, right]
    for _ in range(10):
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                pass
    assert not waiting
    return dict(pair[0] for pair in right.getpeercert()["subject"])["commonName"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_site_with_its_certificate_is_let_in(issued, host):
    assert handshake(issued, client="ours-client", host=host) == "north"


@pytest.mark.parametrize(
    "case",
    [
        {"client": None},
        {"client": "theirs-client"},
        {"client": "ours-old"},
        {"client": "ours-early"},
        {"client": "ours-server"},
        {"client": "ours-client", "server": "theirs-server"},
        {"client": "ours-client", "server": "ours-client"},
        {"client": "ours-client", "trusts": "theirs"},
        {"client": "ours-client", "host": "example.org"},
    ],
    ids=str,
)
def test_nobody_else_gets_through(issued, case):
    with pytest.raises(ssl.SSLError):
        handshake(issued, **case)


def test_a_site_cannot_issue_certificates(issued):
    """The authority's path length is 0, and a site's certificate is for its own end only."""
    ca, key = room.create_authority("demo", now=NOW), room.new_key()
    site = room.issue_client(ca, room.make_request(key, "north"), "north", now=NOW)
    forged = room.issue_client(room.Authority(site, key), room.make_request(room.new_key(), "west"), "west", now=NOW)
    with pytest.raises(Untrusted, match="was not issued"):
        room.check_issued(forged, ca.certificate, "certificate")
    extension = x509.load_pem_x509_certificate(site).extensions.get_extension_for_class(x509.BasicConstraints)
    assert not extension.value.ca
    assert extension.critical
    top = x509.load_pem_x509_certificate(ca.certificate).extensions.get_extension_for_class(x509.BasicConstraints)
    assert (top.value.ca, top.value.path_length, top.critical) == (True, 0, True)


def test_dates_are_checked_to_the_second():
    ca = room.create_authority("demo", now=NOW, days=365)
    end, begin = NOW + timedelta(days=365), NOW - room.EARLY
    assert room.check_valid(ca.certificate, NOW, "it") == 365
    assert room.check_valid(ca.certificate, begin, "it") == 365
    assert room.check_valid(ca.certificate, end - timedelta(seconds=1), "it") == 0
    for now, state in ((end, "expired"), (begin - timedelta(seconds=1), "not yet valid")):
        with pytest.raises(Untrusted, match=f"it is {state}: valid {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M}"):
            room.check_valid(ca.certificate, now, "it")
    assert room.check_valid(ca.certificate, end - timedelta(days=30), "it") == room.WARN_DAYS


def pem_of(der):
    """Wraps any bytes as a certificate request."""
    return b"-----BEGIN CERTIFICATE REQUEST-----\n%b-----END CERTIFICATE REQUEST-----\n" % base64.encodebytes(der)


def test_requests_for_another_name_or_curve_or_altered_are_refused():
    ca, key = room.create_authority("demo", now=NOW), room.new_key()
    request = room.make_request(key, "north")
    with pytest.raises(Untrusted, match="for this name"):
        room.issue_client(ca, request, "west", now=NOW)
    other = x509.CertificateSigningRequestBuilder().subject_name(x509.load_pem_x509_csr(request).subject)
    wrong = other.sign(ec.generate_private_key(ec.SECP384R1()), SHA256()).public_bytes(Encoding.PEM)
    with pytest.raises(Untrusted, match="P-256"):
        room.issue_client(ca, wrong, "north", now=NOW)
    der = x509.load_pem_x509_csr(request).public_bytes(Encoding.DER)
    room.issue_client(ca, pem_of(der), "north", now=NOW)
    signature = (
        75  # most bytes at the end that may change: DER's count of unused bits there may be 0 or 1, without effect
    )
    for place, mask in itertools.product(range(len(der) - signature), (0x01, 0x80)):
        altered = bytearray(der)
        altered[place] ^= mask
        with pytest.raises(Untrusted):
            room.issue_client(ca, pem_of(bytes(altered)), "north", now=NOW)
    forged = der[:-8] + bytes(8)
    with pytest.raises(Untrusted, match="not signed by its key"):
        room.issue_client(ca, pem_of(forged), "north", now=NOW)
    for junk in (b"", b"-----BEGIN CERTIFICATE REQUEST-----\n", ca.certificate):
        with pytest.raises(Untrusted, match="does not parse"):
            room.issue_client(ca, junk, "north", now=NOW)


def test_certificates_of_strangers_and_junk(issued):
    ours, theirs = (issued / "ours-ca.pem").read_bytes(), (issued / "theirs-ca.pem").read_bytes()
    client = (issued / "ours-client.pem").read_bytes()
    room.check_issued(client, ours, "certificate")
    with pytest.raises(Untrusted, match="not issued by the pinned authority"):
        room.check_issued(client, theirs, "certificate")
    for junk in (b"", b"-----BEGIN CERTIFICATE-----"):
        with pytest.raises(Untrusted, match="does not parse"):
            room.read_certificate(junk, "certificate")
        with pytest.raises(Untrusted):
            room.read_key(junk)


def test_fingerprints_are_sha256_in_groups():
    assert room.fingerprint(b"abc").replace("-", "") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    )
    assert re.fullmatch(r"([0-9a-f]{4}-){15}[0-9a-f]{4}", room.fingerprint(b"abc"))


def test_the_authority_does_not_show_its_key():
    assert repr(room.create_authority("demo", now=NOW)) == "Authority(key=***)"
