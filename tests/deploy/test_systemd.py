"""The systemd units: systemd's own checks where it is installed, and always the keys that the handbook promises."""

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = {
    "offsite-coordinator.service": "/var/lib/offsite/coordinator",
    "offsite-client@.service": "/var/lib/offsite/%i",
}
PROMISED = {
    "Restart": "on-failure",
    "SuccessExitStatus": "143",
    "TimeoutStopSec": "5",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "UMask": "0077",
    "LimitCORE": "0",
    "MemoryMax": "80%",
}
EXPOSURE = 20  # of 100; systemd's word for it is `OK`


class Repeated(dict[str, str]):
    """Keeps every value of a key that a unit gives several times, one line each."""

    def __setitem__(self, key: str, value: object) -> None:
        if isinstance(value, list) and key in self:
            value = [*super().__getitem__(key), *value]
        super().__setitem__(key, value)  # type: ignore[assignment]


def read(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False, dict_type=Repeated)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string((ROOT / "deploy" / "systemd" / name).read_text())
    return parser


def installed(name: str, folder: Path, extra: str = "") -> Path:
    """Writes a unit as an installation here would: an instance, and the program of this environment."""
    program = Path(sys.executable).parent / "offsite"
    text = (ROOT / "deploy" / "systemd" / name).read_text().replace("/opt/offsite/bin/offsite", str(program))
    path = folder / name.replace("@", "@north")
    path.write_text(text.replace("[Install]", f"{extra}\n[Install]"))
    return path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze here")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", UNITS)
def test_the_promised_keys(name: str) -> None:
    unit, folder = read(name), UNITS[name]
    service = unit["Service"]
    assert {key: service.get(key) for key in PROMISED} == PROMISED
    assert service["ReadWritePaths"] == folder
    assert service.get("OOMPolicy") == ("continue" if name == "offsite-client@.service" else None)
    assert service.get("LimitNOFILE") == ("65536" if name == "offsite-coordinator.service" else None)
    assert service["User"] not in ("", "root")
    assert set(service["RestrictAddressFamilies"].split()) == {"AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"}
    environment = service["Environment"].split()
    assert {"FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_UPDATE_CHECK=1", "HF_HUB_OFFLINE=1"} <= set(environment)
    assert not re.search(r"(?i)secret|token|password", service["Environment"])


@pytest.mark.parametrize("name", UNITS)
def test_the_command_is_one_of_the_six(name: str) -> None:
    command = read(name)["Service"]["ExecStart"]
    expected = {
        "offsite-coordinator.service": "/opt/offsite/bin/offsite coordinator run /var/lib/offsite/coordinator/fed.toml",
        "offsite-client@.service": "/opt/offsite/bin/offsite client run /var/lib/offsite/%i",
    }
    assert command == expected[name]


@pytest.mark.parametrize("name", UNITS)
def test_systemd_accepts_the_unit(name: str, tmp_path: Path) -> None:
    done = analyze("verify", "--man=no", str(installed(name, tmp_path)))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("extra", ["ProtectSytem=strict", "TimeoutStopSec=soon"])
def test_systemd_would_have_said_so(extra: str, tmp_path: Path) -> None:
    done = analyze("verify", "--man=no", str(installed("offsite-client@.service", tmp_path, extra)))
    assert "ignoring" in done.stderr


@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_little_exposed(name: str, tmp_path: Path) -> None:
    path = installed(name, tmp_path)
    done = analyze("security", "--offline=true", "--no-pager", f"--threshold={EXPOSURE}", str(path))
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze cannot look at a file")
    assert done.returncode == 0, done.stdout.splitlines()[-1:]
