"""The encrypted package opens at every site, is the same after a restart, and is made anew where a crash tore it."""

import dataclasses
import errno
import hashlib
import io
import json
import os
from pathlib import Path

import pytest

from offsite.coordinator.network.package_delivery import Delivery, deliver
from offsite.emulator.package.package_reader import read_manifest
from offsite.errors import DataError
from offsite.protos.signed_job import package_context
from offsite.trust import streaming
from tests.memory_federation import World, make_world


@pytest.fixture(scope="module")
def world(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(fed, tmp_path_factory.mktemp("delivery"))


class Place:
    """The folders of a depot and of a run's facts."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.depot, self.facts = world, folder / "depot", folder / "delivery.json"

    def deliver(self) -> Delivery:
        world = self.world
        folder = world.run.store.package
        return deliver(folder, self.depot, world.manifest, world.federation, self.facts, sites=world.sites)

    def file(self, delivery: Delivery) -> Path:
        return self.depot / delivery.sha256.hex()

    def check(self, delivery: Delivery) -> None:
        """Asserts that every site can open the file, and that the content is the package."""
        sealed = self.file(delivery).read_bytes()
        assert (hashlib.sha256(sealed).digest(), len(sealed)) == (delivery.sha256, delivery.size)
        manifest = read_manifest(self.world.run.store.package).to_bytes()
        for site, key in self.world.sealing.items():
            plain = io.BytesIO()
            opened = key.open(delivery.sealed[site], package_context(self.world.manifest, delivery.sha256))
            streaming.decrypt(io.BytesIO(sealed), plain, opened)
            assert manifest in plain.getvalue()


@pytest.fixture
def place(world: World, tmp_path: Path) -> Place:
    return Place(world, tmp_path)


def test_a_restart_hands_out_the_same(place: Place) -> None:
    first = place.deliver()
    place.check(first)
    written = place.file(first).stat().st_mtime_ns
    assert place.deliver() == first
    assert place.file(first).stat().st_mtime_ns == written
    assert [path.name for path in place.depot.iterdir()] == [first.sha256.hex()]


@pytest.mark.parametrize("tear", ["emptied", "shorter", "longer", "zeros at the end", "one bit", "gone"])
def test_a_torn_file_is_not_offered_again(place: Place, tear: str) -> None:
    first = place.deliver()
    path, whole = place.file(first), place.file(first).read_bytes()
    torn = {
        "emptied": b"",
        "shorter": whole[:-1],
        "longer": whole + b"\0",
        "zeros at the end": whole[:-4096] + bytes(4096),  # some file systems leave zeros after a loss of power
        "one bit": bytes([whole[0] ^ 1]) + whole[1:],
    }
    path.write_bytes(torn[tear]) if tear in torn else path.unlink()
    second = place.deliver()
    assert second.sha256 != first.sha256
    place.check(second)
    assert not path.exists()
    assert place.deliver() == second


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"null", b"[]", b"{}", b'{"sha256": "zz", "size": 1, "sealed": {}}', b'{"sha256": 1}'],
    ids=ascii,
)
def test_damaged_facts_are_made_anew_under_another_key(place: Place, content: bytes) -> None:
    """The facts alone held the key; a site that still fetches the old file has the key from the old offer."""
    first = place.deliver()
    place.facts.write_bytes(content)
    second = place.deliver()
    assert second.sha256 != first.sha256
    place.check(first)
    place.check(second)
    assert place.deliver() == second


def test_facts_without_a_site_are_made_anew(place: Place) -> None:
    facts = place.deliver()
    content = json.loads(place.facts.read_text())
    del content["sealed"][min(facts.sealed)]
    place.facts.write_text(json.dumps(content))
    place.check(place.deliver())


def test_every_truncation_of_the_facts_is_got_over(place: Place) -> None:
    whole = (place.deliver(), place.facts.read_bytes())[1]
    for length in range(0, len(whole), max(1, len(whole) // 10)):
        place.facts.write_bytes(whole[:length])
        assert place.file(place.deliver()).is_file()


def test_the_file_has_its_name_after_its_bytes_are_on_disk(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, set[str]]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, {path.name for path in place.depot.iterdir()}))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    delivery = place.deliver()
    name, inode = delivery.sha256.hex(), place.file(delivery).stat().st_ino
    assert any(one == inode and name not in names for one, names in synced)
    assert any(one == place.depot.stat().st_ino and name in names for one, names in synced)


def test_a_depot_that_cannot_be_made_is_said(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        with pytest.raises(DataError, match=r"^depot=.*No space left on device.*free disk space"):
            place.deliver()
    place.check(place.deliver())


def test_the_key_is_bound_to_the_job(place: Place) -> None:
    delivery = place.deliver()
    other = dataclasses.replace(place.world.manifest, rounds=place.world.manifest.rounds + 1)
    site, key = next(iter(place.world.sealing.items()))
    with pytest.raises(Exception, match="seal"):
        key.open(delivery.sealed[site], package_context(other, delivery.sha256))
