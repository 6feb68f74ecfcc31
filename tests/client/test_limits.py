"""The owner's limits on a running process, and the answer to a job that does not fit into them."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from offsite.client.home.package_room import PackageRoom
from offsite.client.home.policy import Policy
from offsite.client.home.redact import REFUSALS, local_message
from offsite.client.service.job_loading import _make_way
from offsite.client.service.process_limits import limit_resources
from offsite.errors import DataError
from offsite.protos import codec
from offsite.protos.messages import MAX_REFRESH_BYTES
from offsite.trust.streaming import COPIES_TO_OPEN
from tests.faults.conftest import wait_for
from tests.memory_federation import RunningSite, World, make_world, policy_for

ROOT = Path(__file__).resolve().parents[2]
LIMITED = """
import sys, torch
from dataclasses import replace
from offsite.client.home.redact import local_message as fault
from offsite.client.service.process_limits import limit_resources
from offsite.client.home.policy import Policy
from offsite.trust.toml_tables import read_settings
from pathlib import Path
policy = replace(read_settings(Path(sys.argv[1]), Policy), max_threads=1, max_memory_gb=1.0)
limit_resources(policy)
print(torch.get_num_threads())
small = torch.ones(2**20)
try:
    large = torch.ones(2**29)
except (MemoryError, RuntimeError) as error:
    from offsite.client.home.redact import local_message as fault
    print(fault(error))
"""


def test_threads_and_memory_of_the_process_are_kept(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(Policy.template())
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "policy.toml")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    threads, told = done.stdout.strip().split("\n")
    assert threads == "1"
    assert told.startswith("not enough memory for this job; raise max_memory_gb")


UNLIMITED = """
import resource, sys
from pathlib import Path
from offsite.client.home.policy import Policy
from offsite.client.service import process_limits
process_limits.CONTAINER = Path(sys.argv[2])
process_limits.limit_resources(Policy.read(Path(sys.argv[1])))
print(resource.getrlimit(resource.RLIMIT_DATA)[0], process_limits.machine_memory())
"""


@pytest.mark.parametrize("container", ["max\n", "2147483648\n", "", None])
def test_without_a_number_three_quarters_of_the_memory_are_the_limit(tmp_path: Path, container: str | None) -> None:
    (tmp_path / "policy.toml").write_text(Policy.template())
    if container is not None:
        (tmp_path / "memory.max").write_text(container)
    arguments = [str(tmp_path / "policy.toml"), str(tmp_path / "memory.max")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", UNLIMITED, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    limit, memory = map(int, done.stdout.split())
    machine = psutil.virtual_memory().total
    assert memory == (min(machine, 2**31) if container == "2147483648\n" else machine)
    assert abs(limit - 3 * memory // 4) <= 1


CRASHING = """
import ctypes, resource, sys
if sys.argv[1] == "forbidden":
    from offsite.cli.main import main
    sys.argv[1:] = ["client", "doctor", "nowhere"]
    try:
        main()
    except SystemExit:
        pass
print(resource.getrlimit(resource.RLIMIT_CORE)[0], ctypes.CDLL(None).prctl(3))
"""


@pytest.mark.parametrize(("kind", "expected"), [("forbidden", "0 0"), ("stock", "1")])
def test_a_client_leaves_no_core(kind: str, expected: str) -> None:
    """The second number is the kernel's own word on whether a core of the process may be written."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CRASHING, kind], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith(expected)


def test_a_limit_that_no_system_has_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"max_memory_gb=1000000000000\.0: the system refuses"):
        limit_resources(policy_for(tmp_path, max_memory_gb=1e12))


def test_a_fault_tells_a_place_and_nothing_of_its_message() -> None:
    try:
        raise ValueError("a record's words")
    except ValueError as error:
        told = local_message(error)
    assert told.startswith("a fault in the site's program at test_limits.py:")
    assert "record" not in told.replace("see its log", "")
    assert "not enough memory" in local_message(MemoryError())


@pytest.mark.parametrize(("most", "left"), [(3000, "abc"), (2999, "bc"), (1000, "c"), (999, ""), (-1, "")])
def test_older_packages_make_way_and_no_more_than_needed(tmp_path: Path, most: int, left: str) -> None:
    for age, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(bytes(1000))
        os.utime(tmp_path / name, (age, age))
    (tmp_path / "half.sealed.partial").write_bytes(bytes(5000))
    _make_way(tmp_path, most, keep="half")
    assert "".join(sorted(path.name for path in tmp_path.iterdir() if path.is_dir())) == left
    assert (tmp_path / "half.sealed.partial").exists()
    _make_way(tmp_path, max(most, 0), keep="other")
    assert not (tmp_path / "half.sealed.partial").exists()  # of a job that came to nothing


@pytest.fixture(scope="module")
def world(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(fed, tmp_path_factory.mktemp("limits"))


def refused(reply: codec.Message) -> codec.OfferReply | None:
    assert isinstance(reply, codec.OfferReply)
    return reply if reply.state == "refused" else None


def ready(reply: codec.Message) -> bool:
    assert isinstance(reply, codec.OfferReply)
    return reply.state == "ready"


def test_a_disk_that_is_full_while_it_is_unpacked_is_told(world: World, tmp_path: Path) -> None:
    """The owner reads the reason, the fetched file is kept, and the next offer but one tries again."""
    site = RunningSite(world, "ash", tmp_path / "ash")
    packages = tmp_path / "ash" / "packages"
    packages.mkdir()
    plain = packages / f"{world.delivery.sha256.hex()}.plain"
    plain.symlink_to("/dev/full")  # every write to it finds no space left on the device
    reply = wait_for(lambda: refused(site.ask("offer", world.offer("ash"))))
    assert reply.detail == f"DataError: {REFUSALS['DataError']}"
    assert "cannot be written" in site.reason
    assert "No space left on device" in site.reason
    assert [path.suffix for path in packages.iterdir()] == [".sealed"]
    wait_for(lambda: ready(site.ask("offer", world.offer("ash"))))  # by itself


def test_three_times_a_package_is_what_unpacking_takes(world: World, tmp_path: Path) -> None:
    """The encrypted file, the plain stream and the files are each about as large."""
    site = RunningSite(world, "ash", tmp_path / "ash")
    site.ready()
    folder = next((tmp_path / "ash" / "packages").iterdir())
    unpacked = sum(path.stat().st_size for path in folder.iterdir())
    assert unpacked <= world.delivery.size <= COPIES_TO_OPEN * unpacked
    room = PackageRoom.of(folder.parent, folder.name, world.delivery.sha256.hex(), world.delivery.size, 0.0)
    assert (room.ready, room.missing, room.here, room.older) == (True, 0, unpacked, 0)
    other = PackageRoom.of(folder.parent, "e" * 64, "f" * 64, world.delivery.size, 1e-9)
    assert (other.ready, other.here, other.older) == (False, 0, unpacked)


def test_the_owner_reads_what_disk_a_refused_job_takes(world: World, tmp_path: Path) -> None:
    """The size is kept with the offer, also where the policy refuses the package."""
    site = RunningSite(world, "ash", tmp_path / "ash", policy={"max_disk_gb": 1e-6})
    reply = site.ask("offer", world.offer("ash"))
    assert isinstance(reply, codec.Refusal)
    assert "max_disk_gb=1e-06; set max_disk_gb = 0.1 there" in site.reason
    (digest,) = site.jobs.names()
    assert site.jobs.package(digest) == (world.delivery.sha256.hex(), world.delivery.size)


def test_the_longest_message_is_the_jobs_own_adapter(world: World, tmp_path: Path) -> None:
    """Before a job is ready no message is long, so that a peer cannot fill memory by announcing a long one."""
    site = RunningSite(world, "ash", tmp_path / "ash", package=world.run.store.package)
    before = site.service.largest()
    site.ready()
    assert before < 9 << 20
    assert site.service.largest() - before == 4 * world.manifest.layout.size + MAX_REFRESH_BYTES
    request = codec.TrainRequest(world.manifest.digest(), 1, world.start)
    assert len(codec.encode(request)) <= 4 * world.manifest.layout.size + 100
