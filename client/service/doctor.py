"""Checks of everything that can be wrong at a site before a job starts, each made once."""

import http.client
import os
import shutil
import ssl
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from urllib.parse import unquote, urlsplit

from offsite.client.home.audit import verify
from offsite.client.home.declared_records import check_count, declared, own_data
from offsite.client.home.installation import SiteHome
from offsite.emulator.runtime.weight_forms import WEIGHT_FORMS
from offsite.errors import CheckFailed, DataError, OffsiteError, PolicyRefusal, Untrusted
from offsite.protos.proxies import check_way, proxy_variables, shown_proxy
from offsite.task.device import AUTO, CPU, choose_devices, too_many
from offsite.task.records import is_empty
from offsite.trust.addresses import with_port
from offsite.trust.certificates import WARN_DAYS

FINE, WARNED, FAILED = "ok", "warning", "FAILED"
PROBE_SECONDS = 5.0
AHEAD_SECONDS = 5.0  # Flower's SuperLink refuses a node whose clock is further ahead, and the node then ends itself
BEHIND_SECONDS = 300.0
MIN_FREE_GB = 2.0
FLOWER = ("1.41", "1.42")
BETWEEN = ("certificates", "link", "depot", "clock")  # checks of what a welcome brings
NOT_JOINED = "not checked, since this site has not joined yet; offsite client sign accepts the coordinator's welcome"


@dataclass(frozen=True)
class Finding:
    """One check: its name, `ok`, `warning` or `FAILED`, and a line for the operator."""

    check: str
    state: str
    detail: str


def examine(site: SiteHome, clock: Callable[[], datetime]) -> list[Finding]:
    """Returns the findings of all checks; a failed check does not stop the later checks."""
    checks: dict[str, Callable[[], str]] = {
        "versions": lambda: _versions(site),
        "device": lambda: _device(site),
        "keys": lambda: _keys(site),
        "certificates": lambda: _certificates(site, clock()),
        "data": lambda: _data(site),
        "policy": lambda: _policy(site),
        "ledger": lambda: _ledger(site),
        "audit log": lambda: f"{verify(site.state / 'audit.jsonl')} entries, chain whole",
        "disk": lambda: _disk(site),
        "proxy": lambda: _proxy(site, os.environ),
        "link": lambda: _port(site, site.welcome.link_port),
        "depot": lambda: _port(site, site.welcome.depot_port),
        "clock": lambda: _clock(site, clock),
    }
    findings = list[Finding]()
    for name, check in checks.items():
        waits = name in BETWEEN and not site.joined
        findings += [Finding(name, WARNED, NOT_JOINED)] if waits else _find(name, check)
    return findings


def _find(name: str, check: Callable[[], str]) -> list[Finding]:
    try:
        detail = check()
    except OffsiteError as error:
        return [Finding(name, FAILED, line) for line in str(error).splitlines()]
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return [Finding(name, FAILED, f"{where}{error.strerror or type(error).__name__}")]
    return [Finding(name, WARNED if detail.startswith("warning: ") else FINE, detail.removeprefix("warning: "))]


def _versions(site: SiteHome) -> str:
    flower = version("flwr")
    if not flower.startswith(FLOWER):
        raise DataError(
            f"flwr={flower}: must be 1.41 or 1.42, since offsite uses Flower's private interface; install flwr 1.42"
        )
    text = f"offsite {version('offsite')}, flwr {flower}, torch {version('torch')}"
    if not WEIGHT_FORMS[site.settings.weights]:
        return text
    from offsite.emulator.runtime.bitsandbytes_layers import library  # needs torch, and few sites need the library

    return f"{text}, bitsandbytes {library().__version__}"


def _device(site: SiteHome) -> str:
    settings = site.settings
    if settings.processes == 1 and settings.device in (AUTO, CPU):
        return f"{settings.device}, in one process"  # nothing to look for, and few sites need torch here
    devices = choose_devices(settings.device, settings.processes)
    text = f"{len(devices)} process{'es' if len(devices) > 1 else ''} on {', '.join(map(str, devices))}"
    return f"warning: {text}; {warning}" if (warning := too_many(devices)) else text


def _keys(site: SiteHome) -> str:
    return f"identity {site.keys.identity.public.hex()[:16]}…, readable by this user only"


def _certificates(site: SiteHome, now: datetime) -> str:
    left = site.check(now)
    text = ", ".join(f"{name} {days} days" for name, days in left.items())
    return f"warning: {text}; ask the coordinator for new certificates" if min(left.values()) <= WARN_DAYS else text


def _data(site: SiteHome) -> str:
    data = own_data(site)
    if not data.records:  # all faults of all lines at once
        raise CheckFailed("\n".join(data.faults) or f"{data.unnamed}; name the columns in site.toml")
    found = data.records
    counts = [len(records) for records in found.values()]
    check_count(site, *counts)
    tasks, number, blocks = ", ".join(found), declared(site), site.settings.blocks
    if number is None:
        text = f"{max(counts)} records, for the tasks {tasks}; the first approval keeps the number"
    else:
        cut = f", and {blocks} blocks of their texts" if blocks else ""
        text = f"{number} records as declared{cut}, for the tasks {tasks}"
    blank = max(sum(map(is_empty, records)) for records in found.values())
    more = [f"{blank} are blank, and stay as records from which nothing is learnt"] if blank else []
    return "; ".join([f"{'warning: ' if more or data.notes else ''}{text}", *more, *data.notes])


def _policy(site: SiteHome) -> str:
    """Says what every job meets whose number of records is declared; approval and training make the same checks."""
    policy, number = site.read_policy(), declared(site)
    most = max(number or 0, site.settings.blocks)
    if most and most < policy.min_records:
        raise PolicyRefusal(
            f"records={most}: policy.toml has min_records={policy.min_records}, so every job is refused; add records "
            "or lower min_records"
        )
    return f"{policy.approval} approval"


def _ledger(site: SiteHome) -> str:
    policy = site.read_policy()
    standing, cap = site.ledger(policy).standing(), policy.epsilon_cap
    return (
        f"{'warning: ' if standing.committed > 0.9 * cap else ''}epsilon {standing.spent:.3f} of {cap:g} spent, "
        f"{standing.committed:.3f} with approved jobs, at delta {standing.delta:.3g}"
    )


def _disk(site: SiteHome) -> str:
    free = shutil.disk_usage(site.folder).free / 2**30
    return f"{'warning: ' if free < MIN_FREE_GB else ''}{free:.1f} GiB free"


def _proxy(site: SiteHome, environment: Mapping[str, str]) -> str:
    """Says which way leads to the coordinator; a value of the environment can hold a password and is not shown."""
    proxy = site.settings.proxy
    if site.joined:
        check_way(site.welcome.host, proxy)
    way = f"through {shown_proxy(proxy)}, which site.toml names" if proxy else "straight to the coordinator"
    variables = proxy_variables(environment)
    return f"{way}; not used: {', '.join(variables)} of the environment" if variables else way


def _port(site: SiteHome, port: int) -> str:
    """Opens a TLS connection with the pinned authority and this site's certificate, as the programs do."""
    context = _context(site)
    context.load_cert_chain(str(site.certificate), str(site.keys.tls))
    connection = _connection(site, port, context)
    where = with_port(site.welcome.host, port)
    try:
        connection.connect()
        return f"{where} answers with {connection.sock.version()}"
    except ssl.SSLError as error:
        raise Untrusted(f"{where}: {error.reason or 'TLS failed'}; is a proxy breaking TLS open?") from error
    except OSError as error:
        raise DataError(f"{where}: {error.strerror or error}; is the coordinator running and the port open?") from error
    finally:
        connection.close()


def _context(site: SiteHome) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(site.ca))


def _connection(site: SiteHome, port: int, context: ssl.SSLContext) -> http.client.HTTPSConnection:
    """Returns a connection to the coordinator, not yet opened, through the proxy of `site.toml` where there is one."""
    host, proxy = site.welcome.host, urlsplit(site.settings.proxy)
    if not proxy.hostname:
        return http.client.HTTPSConnection(host, port, timeout=PROBE_SECONDS, context=context)
    connection = http.client.HTTPSConnection(proxy.hostname, proxy.port, timeout=PROBE_SECONDS, context=context)
    user = f"{unquote(proxy.username or '')}:{unquote(proxy.password or '')}"
    known = {"Proxy-Authorization": f"Basic {b64encode(user.encode()).decode()}"} if proxy.username else {}
    connection.set_tunnel(host, port, known)
    return connection


def _clock(site: SiteHome, clock: Callable[[], datetime]) -> str:
    """Compares this machine's clock with the coordinator's, from the date of an HTTP answer."""
    ahead = clock().timestamp() - _remote_time(site)
    if ahead > AHEAD_SECONDS or ahead < -BEHIND_SECONDS:
        raise PolicyRefusal(f"clock={ahead:+.0f} s from the coordinator's; Flower refuses +5 s or -300 s; start NTP")
    return f"{ahead:+.1f} s from the coordinator's"


def _remote_time(site: SiteHome) -> float:
    connection = _connection(site, site.welcome.link_port, _context(site))
    try:
        began = time.monotonic()
        connection.request("GET", "/health")
        stamp = connection.getresponse().getheader("date")
        if stamp is None:
            raise DataError("link: the answer has no date; is this the coordinator's SuperLink?")
        # half a second, since the header is cut to whole seconds
        return parsedate_to_datetime(stamp).timestamp() + 0.5 + (time.monotonic() - began) / 2
    except OSError as error:
        raise DataError(f"link: {error.strerror or error}; is the coordinator running?") from error
    finally:
        connection.close()
