"""Hosts: each text that is no host is refused with what to change, and each host goes into URL and certificate."""

import ssl
from datetime import UTC, datetime

import httpx
import pytest
from cryptography import x509

from offsite.errors import ConfigError
from offsite.protos.proxies import check_way
from offsite.trust import certificates
from offsite.trust.addresses import check_host, with_port

NOW = datetime.now(UTC)
HOSTS = ["localhost", "fed.example.org", "Fed-1.Example.ORG", "xn--bcher-kva.example", "a" * 63 + ".org", "3com.net"]
ADDRESSES = ["127.0.0.1", "10.0.0.30", "::1", "2001:db8::7", "2001:DB8:0:0:0:0:0:7", "::ffff:192.0.2.7"]
WRONG = {
    "": "must be a host name or an IP address",
    " ": "leave out the spaces",
    " fed.example.org": "leave out the spaces",
    "fed.example.org\n": "leave out the spaces",
    "fed example.org": "letters, digits and inner hyphens",
    "fed.example.org:8443": "leave out the colon and the port; the ports are --link-port and --depot-port",
    "192.0.2.7:8443": "leave out the colon and the port",
    "[::1]": "without brackets",
    "[::1]:8443": "without brackets; the ports are --link-port",
    "http://fed.example.org": "leave out http://",
    "https://fed.example.org:8443/x": "leave out http://",
    "fed.example.org/x": "letters, digits and inner hyphens",
    "user@fed.example.org": "letters, digits and inner hyphens",
    "fed.example.org.": "leave out the dot at its end",
    "fed..org": "letters, digits and inner hyphens",
    ".org": "letters, digits and inner hyphens",
    "-fed.org": "letters, digits and inner hyphens",
    "fed_1.org": "letters, digits and inner hyphens",
    "a" * 64 + ".org": "1 to 63 letters",
    ".".join(["a" * 49] * 6): "at most 253",
    "*.example.org": "write its whole name in the place of",
    "*": "write its whole name in the place of",
    "bücher.example": "begins with xn--",
    "10.0.0.300": "four numbers from 0 to 255",
    "10.0.0": "four numbers from 0 to 255",
    "10.0.0.1.2": "four numbers from 0 to 255",
    "010.0.0.1": "four numbers from 0 to 255",
    "17": "four numbers from 0 to 255",
    "fed.example.7": "the last part of a name is not a number",
    "::1::2": "eight groups of hexadecimal digits",
    "2001:db8::g": "eight groups of hexadecimal digits",
    "1:2:3:4:5:6:7:8:9": "eight groups of hexadecimal digits",
    "fe80::1%eth0": "has no meaning on another machine",
    "0.0.0.0": 'no site can reach it; .* set bind = "0.0.0.0"',
    "::": 'no site can reach it; .* set bind = "::"',
    "224.0.0.1": "stands for many machines",
    "ff02::1": "stands for many machines",
    "255.255.255.255": "stands for many machines",
}


@pytest.mark.parametrize("host", WRONG)
def test_a_text_that_is_no_host_is_refused_with_what_to_change(host: str) -> None:
    with pytest.raises(ConfigError, match=WRONG[host]) as refused:
        check_host("host", host)
    assert str(refused.value).startswith(f"host={host!r}: ")
    assert "\n" not in str(refused.value)
    assert str(refused.value).count("; ") <= 2


def test_all_addresses_of_a_machine_can_be_listened_on() -> None:
    for host in ("0.0.0.0", "::", *ADDRESSES):
        check_host("bind", host, listens=True)
    with pytest.raises(ConfigError, match="bind='ff02::1'"):
        check_host("bind", "ff02::1", listens=True)


@pytest.mark.parametrize("host", [*HOSTS, *ADDRESSES])
def test_a_host_is_in_the_certificate_and_in_urls_as_a_client_reads_it(host: str) -> None:
    """httpx, which Flower uses, and the TLS library are the second way of reading both."""
    check_host("host", host)
    url = httpx.URL(f"https://{with_port(host, 8443)}/health")
    assert url.port == 8443
    ca, key = certificates.create_authority("demo", now=NOW), certificates.new_key()
    pem = certificates.issue_server(ca, key, [host, "localhost"], now=NOW)
    assert certificates.is_for(pem, [host, "localhost"])
    assert not certificates.is_for(pem, [host])
    names = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert len(list(names)) == 2
    assert handshakes(ca.certificate, pem + key, url.host)
    assert not handshakes(ca.certificate, pem + key, "other.example")


def handshakes(ca: bytes, server: bytes, name: str) -> bool:
    """Whether a client that wants a name takes a server's certificate."""
    import tempfile

    there, here = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with tempfile.NamedTemporaryFile() as file:
        file.write(server)
        file.flush()
        there.load_cert_chain(file.name)
    here.load_verify_locations(cadata=ca.decode())
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    left = here.wrap_bio(down, up, server_hostname=name)
    right = there.wrap_bio(up, down, server_side=True)
    for _ in range(5):
        for side in (left, right):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError:
                return False
    return bool(left.version())


def test_a_proxy_is_never_asked_for_an_ipv6_address_which_libraries_write_without_brackets() -> None:
    for host, proxy in (("::1", ""), ("fed.example.org", "http://p:1"), ("192.0.2.7", "http://p:1")):
        check_way(host, proxy)
    with pytest.raises(ConfigError, match=r"host='2001:db8::7': the way through proxy=p:3128 needs a name") as refused:
        check_way("2001:db8::7", "http://user:secret@p:3128")
    assert "secret" not in str(refused.value)
