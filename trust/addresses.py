"""Names and addresses of the coordinator: checked once where a person gives them, and written with a port for a URL."""

import re
from ipaddress import IPv4Address, IPv6Address, ip_address

from offsite.errors import ConfigError

MAX_NAME = 253
_PORTS = "the ports are --link-port and --depot-port"
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_RULE = "must be a host name or an IP address, as fed.example.org, 192.0.2.7 or 2001:db8::7"


def check_host(key: str, host: str, *, listens: bool = False) -> None:
    """Checks a host as a person gave it: it must be a name or an address, and nothing more.

    A certificate is made for the host, and peers compare the two, so nothing is taken away from the text here.

    Args:
      key: name of the setting, for the message.
      host: the text.
      listens: whether the host is an address to listen on, which may stand for all addresses of a machine.

    Raises:
      ConfigError: the text is no host; the message says what to change.
    """
    if reason := _fault(host, listens=listens):
        raise ConfigError(f"{key}={host!r}: {reason}")


def with_port(host: str, port: int) -> str:
    """Returns host and port as URLs, gRPC and Flower take them, an IPv6 address in brackets and in its short form."""
    address = address_of(host)
    if address is None:
        return f"{host}:{port}"
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def address_of(host: str) -> IPv4Address | IPv6Address | None:
    """Returns the address that a host is, or None for a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def _fault(host: str, *, listens: bool) -> str:
    """Returns what is wrong with a host and what to do, or ""."""
    address = address_of(host)
    if address is not None:
        return _fault_of_address(address, listens=listens)
    return _more_than_a_host(host) or _fault_of_name(host)


def _more_than_a_host(host: str) -> str:
    """Returns what a text has beside a host, or ""."""
    steps = {
        "leave out the spaces around it": host != host.strip(),
        "leave out http:// or https:// and what comes after the name": "://" in host,
        f"write an IPv6 address without brackets; {_PORTS}": host.startswith("[") or host.endswith("]"),
        f"leave out the colon and the port; {_PORTS}": host.count(":") == 1 and host.rpartition(":")[2].isdigit(),
        "leave out the dot at its end, which no certificate has": host.endswith("."),
        "sites connect to one machine, so write its whole name in the place of *": "*" in host,
    }
    step = next((step for step, needed in steps.items() if needed), "")
    return f"{_RULE}; {step}" if step else ""


def _fault_of_name(host: str) -> str:
    if not host.isascii():
        return f"{_RULE}; write a name of other letters in its ASCII form, which begins with xn--"
    labels = host.split(".")
    if all(re.fullmatch(r"[0-9]+", label) for label in labels):
        return "must be an IPv4 address of four numbers from 0 to 255, or a host name; correct the numbers"
    if ":" in host:
        return "must be an IPv6 address of eight groups of hexadecimal digits, or a host name; correct the groups"
    if labels[-1].isdigit():
        return f"{_RULE}; the last part of a name is not a number"
    if len(host) > MAX_NAME or not all(map(_LABEL.fullmatch, labels)):
        return f"{_RULE}; each part has 1 to 63 letters, digits and inner hyphens, and the whole at most {MAX_NAME}"
    return ""


def _fault_of_address(address: IPv4Address | IPv6Address, *, listens: bool) -> str:
    if isinstance(address, IPv6Address) and address.scope_id:
        return f"{_RULE}; an address with a zone (%{address.scope_id}) has no meaning on another machine"
    if address.is_unspecified and not listens:
        return (
            f"stands for all addresses of a machine, so no site can reach it; give the name or address that sites use, "
            f'and set bind = "{address}" in coordinator.toml'
        )
    if address.is_multicast or str(address) == "255.255.255.255":
        return "stands for many machines; give the name or address of the coordinator's machine"
    return ""
