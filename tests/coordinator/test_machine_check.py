"""Ports and free room, checked with real sockets and real files."""

import socket
from pathlib import Path

import pytest

from offsite.coordinator.check.machine import check_port, check_room
from offsite.coordinator.config.federation_file import read_config
from offsite.task.findings import Findings
from tests.ports import free_ports


def test_a_port_in_use_is_named_and_a_free_one_is_not(tmp_path: Path) -> None:
    findings = Findings()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        check_port("link_port", "127.0.0.1", port, findings, patience=0.3)
    assert findings.errors == [
        f"link_port={port} at 127.0.0.1: another program listens there; stop that program, or set another link_port "
        "in coordinator.toml and send the sites the welcomes of a new offsite coordinator approve"
    ]
    check_port("link_port", "127.0.0.1", port, findings)
    assert len(findings.errors) == 1


def test_the_checked_port_is_free_for_the_program_itself() -> None:
    findings, port = Findings(), free_ports(1)[0]
    check_port("depot_port", "127.0.0.1", port, findings)
    with socket.socket() as program:
        program.bind(("127.0.0.1", port))
        program.listen()
    assert findings.errors == []


@pytest.mark.parametrize("host", ["192.0.2.1", "198.51.100.7"])
def test_an_address_of_another_machine(host: str) -> None:
    findings = Findings()
    check_port("link_port", host, free_ports(1)[0], findings)
    (line,) = findings.errors
    assert line.startswith(f"host={host!r}: is no address of this machine")
    assert "set bind in coordinator.toml" in line


def test_room_is_compared_with_the_packages(fed: Path, tmp_path: Path) -> None:
    config, _ = read_config(fed)
    weights = sum(file.stat().st_size for file in (fed.parent / "model").glob("*.safetensors"))
    out = tmp_path / "new" / "run"
    for free, errors, warnings in ((3 * weights, 0, 0), (2 * weights, 0, 0), (weights, 0, 1), (weights // 20, 1, 0)):
        findings = Findings()
        check_room(config, out, 2, findings, free=lambda place, free=free: free)  # type: ignore[misc]
        assert (len(findings.errors), len(findings.warnings)) == (errors, warnings), free
    assert not out.parent.exists()
    assert "GB are free" in findings.errors[0]
