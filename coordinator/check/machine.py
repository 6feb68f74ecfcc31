"""The check of the machine: free room on the disk, and free ports."""

import errno
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

from offsite.coordinator.config.federation_file import FedConfig
from offsite.errors import ConfigError
from offsite.task.findings import Findings
from offsite.task.model_folder import widening

PATIENCE = 5.0  # seconds; a SuperLink whose coordinator was killed holds its port a moment longer
SMALLEST = 16  # a package is no smaller than this part of the model: 2 bits for each 32


def check_room(
    config: FedConfig,
    folder: Path,
    copies: int,
    findings: Findings,
    free: Callable[[Path], int] = lambda place: shutil.disk_usage(place).free,
) -> None:
    """Compares the free room with the size of the packages; a package is at most as large as the model.

    Args:
      config: the federation file.
      folder: run folder, which may not exist yet.
      copies: number of packages, encrypted files and streams that will lie on the disk at the same time.
      findings: findings so far.
      free: function that returns the free bytes at a place.
    """
    model = Path(config.model.path)
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors")) * widening(model)
    with findings.gathering():
        place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
        if not os.access(place, os.W_OK):
            raise ConfigError(f"out={str(folder)!r}: the folder {str(place)!r} cannot be written; choose another place")
        room, needed = free(place), copies * weights
        line = (
            f"disk={str(place)!r}: {room / 1e9:.2f} GB are free, and the emulator packages take up to "
            f"{needed / 1e9:.2f} GB ({copies} times the model's size, at most); free disk space, or choose another "
            "place"
        )
        if room < needed / SMALLEST:
            findings.add(line)
        elif room < needed:
            findings.warn(line)


def check_port(name: str, host: str, port: int, findings: Findings, patience: float = PATIENCE) -> None:
    """Binds a port for a moment, as the program will do later.

    Args:
      name: name of the port's setting.
      host: address to listen on.
      port: TCP port.
      findings: findings so far.
      patience: time in seconds to wait for a port that is in use.
    """
    until = time.monotonic() + patience
    while True:
        try:
            _bind(host, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < until:
                time.sleep(0.1)
                continue
            findings.add(_refusal(name, host, port, error))
        return


def _bind(host: str, port: int) -> None:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        probe.listen(1)  # two sockets may be bound to a port with this option, and only one may listen


def _refusal(name: str, host: str, port: int, error: OSError) -> str:
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return (
            f"host={host!r}: is no address of this machine ({error.strerror}); set bind in coordinator.toml to the "
            "address to listen on, for example 0.0.0.0"
        )
    if error.errno == errno.EADDRINUSE:
        return (
            f"{name}={port} at {host}: another program listens there; stop that program, or set another {name} in "
            "coordinator.toml and send the sites the welcomes of a new offsite coordinator approve"
        )
    return f"{name}={port} at {host}: cannot be listened on ({error.strerror}); set another {name} in coordinator.toml"
