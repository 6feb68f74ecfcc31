"""HTTP proxies: no program of ours follows the environment's, and only `site.toml` names one, to the coordinator."""

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from offsite.errors import ConfigError
from offsite.trust.addresses import address_of, with_port

VARIABLE = "OFFSITE_PROXY"  # by which a site tells its SuperNode the proxy; a command line would show its password
# gRPC's way to a proxy by address, which its option against proxies does not switch off.
_GRPC_BY_ADDRESS = "grpc_address_http_proxy"


def names_proxy(variable: str) -> bool:
    """Says whether a program could take a proxy, or the exceptions from one, from a variable of this name."""
    return variable.lower().endswith("_proxy") or variable.lower().startswith(_GRPC_BY_ADDRESS)


def proxy_variables(environment: Mapping[str, str]) -> list[str]:
    """Returns the names of the variables about proxies that are set, sorted; a value can hold a password."""
    return sorted(name for name, value in environment.items() if value and names_proxy(name))


def without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment without variables about proxies."""
    return {name: value for name, value in environment.items() if not names_proxy(name)}


def forget_proxies() -> list[str]:
    """Removes all variables about proxies from this process and its later children, and returns the set ones' names.

    A program calls this function at its start: libraries in C read the environment too.
    """
    names = proxy_variables(os.environ)
    for name in [name for name in os.environ if names_proxy(name)]:
        del os.environ[name]
    return names


def check_proxy(url: str) -> None:
    """Checks the address of a proxy.

    Args:
      url: `http://HOST:PORT`, or `http://USER:PASSWORD@HOST:PORT`; empty for no proxy.

    Raises:
      ConfigError: the address has another form; the message does not repeat it, since it can hold a password.
    """
    if not url:
        return
    try:
        parts = urlsplit(url)
        whole = parts.scheme == "http" and bool(parts.hostname) and parts.port is not None
    except ValueError:
        whole = False
    if not whole or not url.isprintable() or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ConfigError("proxy: must be like 'http://proxy.example:3128', with user:password@ before the host or not")


def check_way(host: str, proxy: str) -> None:
    """Checks that a proxy can be asked for a host.

    Args:
      host: name or address of the coordinator.
      proxy: address of the proxy; empty for the straight way.

    Raises:
      ConfigError: the host is an IPv6 address, which httpx and http.client write into `CONNECT` without its brackets.
    """
    address = address_of(host)
    if proxy and address is not None and address.version == 6:
        raise ConfigError(
            f"host={host!r}: the way through proxy={shown_proxy(proxy)} needs a name or an IPv4 address; ask the "
            "coordinator to set host in coordinator.toml to a name, or leave proxy out of site.toml"
        )


def shown_proxy(url: str) -> str:
    """Returns host and port of a proxy, without user and password."""
    parts = urlsplit(url)
    return with_port(parts.hostname or "", parts.port or 0)
