"""Delivery of a package to two sites: by the depot, by Flower messages, and by the depot to a site killed three times.

`python -m bench.depot` starts every party as a process of its own, over TLS on loopback, one way after the other, and
prints JSON. Flower runs as offsite runs it: warm programs and a poll every 0.3 s, which is faster than its defaults.
"""

import argparse
import hashlib
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SITES = ("ash", "birch")
MIN_RATIO, MAX_CLIENT_MB = 3.0, 150.0
FLOWER_SECONDS = 600.0
KILLED_AT = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class World:
    """The files that the parties share.

    Attributes:
      folder: folder with certificates, keys and the package.
      size: size of the package in bytes.
      sha256: hash of the package, hexadecimal.
    """

    folder: Path
    size: int
    sha256: str

    def pem(self, name: str) -> bytes:
        """Returns the content of a file in the folder."""
        return (self.folder / name).read_bytes()

    @property
    def package(self) -> Path:
        """Path of the package, under the name that the depot expects."""
        return self.folder / "depot" / self.sha256


def build(folder: Path, size: int) -> World:
    """Makes an authority, a coordinator, the sites' keys, and `size` random bytes."""
    from offsite.trust.certificates import create_authority, issue_client, issue_server, make_request, new_key
    from offsite.trust.keys import SiteKeys

    now, key = datetime.now(UTC), new_key()
    ca = create_authority("bench", now=now)
    (folder / "ca.pem").write_bytes(ca.certificate)
    (folder / "server.key").write_bytes(key)
    (folder / "server.pem").write_bytes(issue_server(ca, key, ["127.0.0.1", "localhost"], now=now))
    for site in SITES:
        own = SiteKeys.create(folder / site, 1).tls.read_bytes()
        (folder / f"{site}.pem").write_bytes(issue_client(ca, make_request(own, site), site, now=now))
    (folder / "depot").mkdir()
    digest, path = hashlib.sha256(), folder / "depot" / "making"
    with path.open("wb") as file:
        for start in range(0, size, 1 << 20):
            digest.update(data := secrets.token_bytes(min(1 << 20, size - start)))
            file.write(data)
    path.rename(folder / "depot" / digest.hexdigest())
    return World(folder, size, digest.hexdigest())


# --- a site


def site_by_depot(world: World, site: str, port: int) -> None:
    """Fetches the package when the parent process gives the start signal."""
    from offsite.client.network.fetch import DepotAddress, fetch

    address = DepotAddress(
        "127.0.0.1", port, world.pem("ca.pem"), world.pem(f"{site}.pem"), world.pem(f"{site}/tls.key")
    )
    before = _peak(os.getpid())
    _wait_for_go()
    began_with = _partial(world, site).stat().st_size if _partial(world, site).exists() else 0
    fetch(address, world.sha256, world.size, world.folder / f"{site}.package", on_bytes=lambda _: None)
    _say(end=time.monotonic(), peak_mb=_peak(os.getpid()), before_mb=before, began_with=began_with)


def site_by_flower(world: World, site: str, port: int) -> None:
    """Receives the package as one message, by a SuperNode with offsite's executor behind it."""
    import psutil

    from offsite.client.network.node import Node, SuperNodeConfig

    stop_signals: list[bool] = []

    def handle(stage: str, body: bytes) -> bytes:
        if hashlib.sha256(body).hexdigest() != world.sha256:
            os._exit(1)  # the node would go on after an exception
        end, children = time.monotonic(), psutil.Process().children()
        _say(
            end=end,
            stage=stage,
            peak_mb=_peak(os.getpid()),
            supernode_peak_mb=sum(_peak(child.pid) for child in children),
        )
        return b"here"

    def stopping() -> bool:
        return bool(stop_signals)

    signal.signal(signal.SIGTERM, lambda *_: stop_signals.append(True))
    config = SuperNodeConfig(
        world.folder / f"{site}.node",
        f"127.0.0.1:{port}",
        ca=world.folder / "ca.pem",
        key=world.folder / site / "node.key",
        port=_free_port(),
    )
    Node(config, handle, largest=lambda: 1 << 30, note=lambda kind, reason: None, stopping=stopping).run()


def _wait_for_go() -> None:
    _say(ready=True)
    sys.stdin.readline()


def _say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def _peak(pid: int) -> float:
    """Returns a process's highest resident memory so far, MB; getrusage would also count its parent's."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


# --- the coordinator


@contextmanager
def sites(world: World, way: str, port: int, names: tuple[str, ...] = SITES) -> Iterator[list[subprocess.Popen[str]]]:
    """Runs a process for each site, and ends the processes afterwards."""
    command = [sys.executable, "-m", "bench.depot", "--folder", str(world.folder), "--size", str(world.size)]
    command += ["--sha256", world.sha256, "--port", str(port), "--way", way, "--site"]
    running = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in names
    ]
    try:
        yield running
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.communicate(timeout=20)


def by_depot(world: World, *, kills: bool = False) -> dict[str, Any]:
    """Serves the package to both sites at once; with `kills`, to one site that is killed three times on the way."""
    from offsite.coordinator.network.depot import Depot, Tls

    tls = Tls(world.pem("ca.pem"), world.pem("server.pem"), world.pem("server.key"))
    depot = Depot(world.folder / "depot", address="127.0.0.1:0", tls=tls, allowed=lambda _: None)
    port = depot.start()
    try:
        return _killed(world, port) if kills else _undisturbed(world, port)
    finally:
        depot.stop()
        for site in SITES:
            (world.folder / f"{site}.package").unlink(missing_ok=True)


def _undisturbed(world: World, port: int) -> dict[str, Any]:
    with sites(world, "depot", port) as running:
        began, said = _go(running)
        for site in SITES:
            _check(world, site)
        return _result(began, said)


def _killed(world: World, port: int) -> dict[str, Any]:
    site, here = SITES[0], []
    partial = _partial(world, site)
    for share in KILLED_AT:
        with sites(world, "depot", port, (site,)) as (process,):
            _release(process)
            while not partial.exists() or partial.stat().st_size < share * world.size:
                if process.poll() is not None:
                    raise RuntimeError("the site ended before it was killed; use a larger package")
                time.sleep(0.001)
            process.kill()
            process.wait()
        here.append(partial.stat().st_size)
    with sites(world, "depot", port, (site,)) as running:
        _, (said,) = _go(running)
    _check(world, site)
    return {"killed_at_bytes": here, "went_on_at_byte": said["began_with"], "hash_matches": True}


def by_flower(world: World, *, in_memory: bool) -> dict[str, Any]:
    """Sends the package to each site as one message with a flat array of bytes."""
    from flwr.app import Message

    from offsite.coordinator.network.flower_exchange import call
    from offsite.coordinator.network.superlink_session import SuperLinkPlace, SuperLinkSession
    from offsite.protos.flower import pack
    from offsite.protos.flower_pieces import OTHER_BYTES
    from offsite.trust.keys import SiteKeys

    folder = world.folder
    place = SuperLinkPlace(
        Path(tempfile.mkdtemp(dir=folder)),
        "127.0.0.1",
        _free_port(),
        folder / "ca.pem",
        folder / "server.pem",
        folder / "server.key",
    )
    nodes = {site: SiteKeys.load(folder / site).node_public() for site in SITES}
    link = SuperLinkSession(place, nodes, largest=OTHER_BYTES)
    if in_memory:
        at = link.process._command.index("--database")
        del link.process._command[at : at + 2]
    with link, sites(world, "flower", place.port) as running:
        while len(nodes := link.node_ids()) < len(SITES):
            time.sleep(0.1)
        time.sleep(3.0)  # both sites have started their programs and wait
        body, began = world.package.read_bytes(), time.monotonic()
        messages = {
            site: Message(content=pack("package", body), dst_node_id=nodes[site], message_type="train")
            for site in SITES
        }
        replies = call(link.grid, messages, FLOWER_SECONDS)
        if set(replies) != set(SITES):
            raise RuntimeError(f"replies={sorted(replies)}: Flower did not deliver; see {place.folder}/superlink.log")
        result = _result(began, [_hear(process) for process in running])
        pid = link.process.pid
        return result | {"superlink_peak_mb": round(_peak(pid)) if pid else None}


def _release(process: subprocess.Popen[str]) -> float:
    """Waits until a site is ready, gives the start signal, and returns the time of the signal, seconds."""
    assert process.stdin is not None
    _hear(process)
    began = time.monotonic()
    process.stdin.write("go\n")
    process.stdin.flush()
    return began


def _go(running: list[subprocess.Popen[str]]) -> tuple[float, list[dict[str, Any]]]:
    began = [_release(process) for process in running]
    return min(began), [_hear(process) for process in running]


def _hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"exit_code={process.wait()}: the site ended without an answer; see its output above")
    said: dict[str, Any] = json.loads(line)
    return said


def _result(began: float, said: list[dict[str, Any]]) -> dict[str, Any]:
    peaks = {
        key: round(max(answer[key] for answer in said), 1)
        for key in ("before_mb", "peak_mb", "supernode_peak_mb")
        if key in said[0]
    }
    return {"seconds": round(max(answer["end"] for answer in said) - began, 2)} | peaks


def _check(world: World, site: str) -> None:
    with (world.folder / f"{site}.package").open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != world.sha256:
            raise RuntimeError(f"site={site}: its package has another hash; look at the depot")


def _partial(world: World, site: str) -> Path:
    return world.folder / f"{site}.package.partial"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(world: World, repeats: int) -> dict[str, Any]:
    """Runs all ways in turn, `repeats` times, and compares the medians."""
    load = os.getloadavg()[0]
    runs: dict[str, list[dict[str, Any]]] = {"depot": [], "flower": [], "flower_in_memory": []}
    for _ in range(repeats):
        runs["depot"].append(by_depot(world))
        runs["flower"].append(by_flower(world, in_memory=False))
        runs["flower_in_memory"].append(by_flower(world, in_memory=True))
    seconds = {way: statistics.median(run["seconds"] for run in of) for way, of in runs.items()}
    ratios = {way: round(seconds[way] / seconds["depot"], 2) for way in ("flower", "flower_in_memory")}
    peak = max(run["peak_mb"] for run in runs["depot"])
    met = {"ratio": min(ratios.values()) >= MIN_RATIO, "client_peak": peak < MAX_CLIENT_MB}
    return {
        "bytes": world.size,
        "sites": len(SITES),
        "load_before": round(load, 2),
        "cpus": os.cpu_count(),
        "seconds": seconds,
        "times_faster_than": ratios,
        "client_peak_mb": peak,
        "bars_met": met,
        "killed": by_depot(world, kills=True),
        "runs": runs,
    }


def main(argv: list[str] | None = None) -> int:
    """Measures and prints JSON, or runs as a site."""
    parser = argparse.ArgumentParser(description="a package by the depot and by Flower messages")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    for hidden in ("--folder", "--sha256", "--way", "--site"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--size", "--port"):
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if args.site is not None:
        play = {"depot": site_by_depot, "flower": site_by_flower}[args.way]
        play(World(Path(args.folder), args.size, args.sha256), args.site, args.port)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        result = measure(build(Path(folder), args.megabytes * 10**6), args.repeats)
    print(text := json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0 if all(result["bars_met"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
