"""One full run, watched from outside: no process asks for another host, no secret or record stands in a log or argv.

Every address that a process connects to, binds or looks up is written down by a library that is loaded before the C
library, so it sees Python, gRPC and Rust alike.
"""

import base64
import os
import re
import threading
import time
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import SITES, Federation, preloaded
from tests.faults.proxy import RecordingProxy
from tests.forked import ENVIRONMENT

pytestmark = pytest.mark.slow
PROGRAMS = (
    "offsite.coordinator.network.superlink",
    "offsite.client.network.supernode",
    "client run",
    "coordinator run",
)


@dataclass
class Watched:
    """The record of a run.

    Attributes:
      federation: folders of the run.
      addresses: process, call, host and port of every address that a process asked for.
      proxy: proxy that the environment of every process named.
      commands: process and command line.
    """

    federation: Federation
    addresses: list[tuple[int, str, str, int]]
    proxy: RecordingProxy
    commands: set[tuple[int, str]] = field(default_factory=set)


@pytest.fixture(scope="module")
def watched(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("quiet")
    library, written = preloaded("watch.c", folder), folder / "addresses"
    federation = Federation(folder, fed, plain=True)
    # off in the environment, so that what is tested is what the programs themselves switch off
    inherited = {name: value for name, value in ENVIRONMENT.items() if not name.startswith(("FLWR_", "HF_", "RAY_"))}
    proxy = RecordingProxy()
    environment = inherited | proxy.environment() | {"LD_PRELOAD": library, "OFFSITE_WATCH": str(written)}
    found, ended = Watched(federation, [], proxy), threading.Event()
    looking = threading.Thread(target=_look, args=(found, ended))
    looking.start()
    try:
        for site in SITES:
            federation.start_site(site, env=environment)
        federation.start_coordinator(job := federation.job("quiet", rounds=2), env=environment)
        assert federation.finish() == 0, federation.log("coordinator")
        assert (federation.run(job) / "adapter").is_dir()
    finally:
        federation.stop()
        ended.set()
        looking.join()
        proxy.close()
    for line in written.read_text().splitlines():
        process, call, host, port = line.split(" ")
        found.addresses.append((int(process), call, host, int(port)))
    return found


def _look(found: Watched, ended: threading.Event) -> None:
    while not ended.wait(0.2):
        for process in psutil.process_iter():
            try:
                command, parent = " ".join(process.cmdline()), process.parent()
                begun = parent is None or " ".join(parent.cmdline()) != command
            except psutil.Error:
                continue
            if begun and str(found.federation.folder) in command:  # a child has its parent's before it runs its own
                found.commands.add((process.pid, command))


def test_no_process_asks_for_another_host(watched: Watched) -> None:
    hosts = {(call, host) for _, call, host, _ in watched.addresses}
    assert {host for call, host in hosts if call != "lookup" and not _is_loopback(host)} == set()
    assert {host for call, host in hosts if call == "lookup"} <= {"127.0.0.1", "localhost"}
    bound = {port for _, call, _, port in watched.addresses if call == "bind"} - {0}
    connected = {port for _, call, _, port in watched.addresses if call in ("connect", "sendto")}
    assert connected <= bound, connected - bound


def test_nothing_arrives_at_the_proxy_that_the_environment_names(watched: Watched) -> None:
    assert watched.proxy.heads == []


def _is_loopback(host: str) -> bool:
    """127.0.0.1, ::1 by which gRPC finds out whether there is IPv6, and the first in the form of the second."""
    address = ip_address(host)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def test_the_watch_saw_every_process_and_both_ports(watched: Watched) -> None:
    """An unseen call would pass the test above."""
    link, depot = watched.federation.ports
    ran = {pid: next((p for p in PROGRAMS if p in command), "") for pid, command in watched.commands}
    seen = {ran.get(pid) for pid, _, _, _ in watched.addresses}
    assert set(PROGRAMS) <= seen
    clients = {pid for pid, program in ran.items() if program == "client run"}
    fetched = {pid for pid, call, _, port in watched.addresses if call == "connect" and port == depot}
    assert clients <= fetched
    nodes = {pid for pid, program in ran.items() if program == "offsite.client.network.supernode"}
    assert nodes <= {pid for pid, call, _, port in watched.addresses if call == "connect" and port == link}
    assert len(watched.addresses) > 50


def secrets_of(folder: Path) -> dict[str, str]:
    """Returns every way in which a key of a federation could stand in a text, by the file of the key."""
    found = {}
    for path in [*folder.rglob("*.key"), *folder.rglob("guard"), *folder.rglob("superexec")]:
        content = path.read_bytes()
        if content.startswith(b"-----"):
            found |= {f"{path.name} {i}": line for i, line in enumerate(content.decode().split("\n")[1:-2]) if line}
            continue
        raw = bytes.fromhex(content.decode()) if path.name in ("guard", "superexec") else content
        found |= {
            f"{path} as hex": raw.hex(),
            f"{path} as base64": base64.b64encode(raw).decode().rstrip("="),
            f"{path} as base64url": base64.urlsafe_b64encode(raw).decode().rstrip("="),
        }
    return found


def texts_of(watched: Watched) -> dict[str, str]:
    """Returns everything that somebody else could read: logs, reports, status, audit logs, command lines."""
    folder = watched.federation.folder
    kinds = ("*.log", "*.md", "*.html", "*.json", "*.jsonl", "*.txt")
    texts = {str(path): path.read_text(errors="replace") for kind in kinds for path in folder.rglob(kind)}
    return texts | {f"argv of {pid}": command for pid, command in watched.commands}


def test_no_key_or_secret_stands_in_a_log_or_command_line(watched: Watched) -> None:
    secrets, texts = secrets_of(watched.federation.folder), texts_of(watched)
    assert len(secrets) > 30
    assert len(texts) > 30
    for where, text in texts.items():
        for what, secret in secrets.items():
            assert secret not in text, (what, where)
        assert "PRIVATE KEY" not in text, where
        assert not re.search(r"--token|eyJ[\w-]{20,}\.|Bearer ", text), where


def test_no_training_text_stands_in_a_log_or_command_line(watched: Watched) -> None:
    """Two words of the tiny world's language in a row are enough; its tokenizer lists each word once."""
    for where, text in texts_of(watched).items():
        if not where.endswith(("tokenizer.json", "vocab.json")):
            assert not re.search(r"\bw\d+[\s,]+w\d+\b", text), where


def test_no_training_text_is_kept_by_the_site_itself(watched: Watched) -> None:
    for site in SITES:
        for path in (watched.federation.site(site) / "state").rglob("*"):
            if path.is_file():
                assert not re.search(rb"\bw\d+[\s,]+w\d+\b", path.read_bytes()), path


def test_the_secret_files_are_their_owners_alone(watched: Watched) -> None:
    folder = watched.federation.folder
    for path in [*folder.rglob("*.key"), *folder.rglob("guard"), *folder.rglob("superexec")]:
        assert path.stat().st_mode & 0o077 == 0, path
        assert path.stat().st_uid == os.getuid()


def test_nothing_goes_on_after_the_end(watched: Watched) -> None:
    time.sleep(0.5)
    for process in psutil.process_iter():
        try:
            assert str(watched.federation.folder) not in " ".join(process.cmdline())
        except psutil.Error:
            continue
