"""Who may hold a connection, against a second implementation that counts everything anew."""

import itertools
import random

import pytest

from offsite.coordinator.network.admission import Admission, Connection, ConnectionLimits
from offsite.coordinator.network.front_door import open_doors

LIMITS = ConnectionLimits(strangers=8, per_address=3, known=6)


class Everyone:
    """An admission, its open connections, and those that it cut, in order."""

    def __init__(self, limits: ConnectionLimits = LIMITS) -> None:
        self.admission, self.cut = Admission(limits), list[Connection]()
        self.open: list[Connection] = []  # in order of arrival
        self.known: list[Connection] = []  # in order of becoming known
        self._ports = itertools.count(1)

    def comes(self, address: str) -> Connection:
        connection = Connection((address, next(self._ports)), lambda: self.cut.append(connection))
        self.open.append(connection)
        self.admission.enter(connection)
        return connection

    def goes(self, connection: Connection) -> None:
        self.admission.leave(connection)
        self._forget(connection)

    def shows(self, connection: Connection) -> None:
        self.known.append(connection)
        self.admission.know(connection)

    def _forget(self, connection: Connection) -> None:
        self.open.remove(connection)
        if connection in self.known:
            self.known.remove(connection)

    def settle(self) -> list[Connection]:
        """Returns what was cut since the last call, and checks it against all connections counted anew."""
        expected: list[Connection] = []
        strangers = [one for one in self.open if one not in self.known]
        if strangers and self.open[-1] is strangers[-1]:
            own = [one for one in strangers if one.peer[0] == self.open[-1].peer[0]]
            if len(own) > LIMITS.per_address:
                expected.append(own[0])
                strangers.remove(own[0])
        for pool, limit in ((strangers, LIMITS.strangers), (self.known, LIMITS.known)):
            if len(pool) > limit:
                most = max(sum(one.peer[0] == other.peer[0] for other in pool) for one in pool)
                crowded = {one.peer[0] for one in pool if sum(one.peer[0] == o.peer[0] for o in pool) == most}
                first = next(one for one in self.cut if one not in expected)
                assert first.peer[0] in crowded
                assert first is next(one for one in pool if one.peer[0] == first.peer[0])
                expected.append(first)
        cut, self.cut = self.cut, []
        assert cut == expected
        for connection in cut:
            self._forget(connection)
        return cut


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_events(seed: int) -> None:
    draw, all_ = random.Random(seed), Everyone()
    addresses = [f"10.0.0.{n}" for n in range(draw.choice([1, 3, 12]))]
    for _ in range(300):
        strangers = [one for one in all_.open if one not in all_.known]
        match draw.choice(["comes", "comes", "shows", "goes"]):
            case "shows" if strangers:
                all_.shows(draw.choice(strangers))
            case "goes" if all_.open:
                all_.goes(draw.choice(all_.open))
            case _:
                newest = all_.comes(draw.choice(addresses))
                assert newest not in all_.cut
        all_.settle()
        assert {one for one in all_.open if all_.admission.of(one.peer) is one} == set(all_.open)


def test_no_number_of_strangers_moves_a_known_peer() -> None:
    all_ = Everyone()
    friend = all_.comes("10.0.0.1")
    all_.shows(friend)
    for number in range(1000):
        all_.comes(f"10.0.{number % 7}.1")
    assert friend not in all_.cut
    assert all_.admission.of(friend.peer) is friend


def test_one_address_pushes_out_its_own() -> None:
    all_ = Everyone()
    others = [all_.comes(f"10.0.1.{number}") for number in range(4)]
    for _ in range(1000):
        all_.comes("10.0.0.1")
    assert {one.peer[0] for one in all_.cut} == {"10.0.0.1"}
    assert all(all_.admission.of(one.peer) is one for one in others)


def test_the_silent_make_way_before_those_who_have_begun_a_request() -> None:
    all_ = Everyone()
    first, second, _ = [all_.comes("10.0.0.1") for _ in range(3)]
    first.asked = True
    all_.comes("10.0.0.1")
    assert all_.cut == [second]


def test_what_was_cut_may_still_show_itself_and_leave() -> None:
    """Its request was on the way; it counts nowhere any more."""
    all_ = Everyone()
    first, *_ = [all_.comes("10.0.0.1") for _ in range(4)]
    assert all_.cut == [first]
    all_.admission.know(first)
    all_.admission.leave(first)
    assert all_.admission.of(first.peer) is None
    assert not first.known


@pytest.mark.parametrize(("soft", "files"), [(300, 1), (300, 3), (1024, 3), (65536, 1), (64, 1), (64, 3)])
def test_limits_fit_into_the_open_files(monkeypatch: pytest.MonkeyPatch, soft: int, files: int) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (soft, soft))
    limits = ConnectionLimits.of_this_process(files)
    assert limits.known > limits.per_address > 1
    assert limits.strangers > limits.per_address
    if soft >= 300:
        assert files * (limits.strangers + limits.known) < soft
        assert limits.known >= limits.strangers > 4 * files


def test_doors_open_on_every_address_of_a_host_with_one_port() -> None:
    doors = open_doors("localhost", 0, Admission(LIMITS))
    ports = {door.getsockname()[1] for door in doors}
    assert len(ports) == 1
    with pytest.raises(OSError, match="in use"):
        open_doors("127.0.0.1", ports.pop(), Admission(LIMITS))
    for door in doors:
        door.close()


def test_a_network_of_ipv6_counts_as_one_address() -> None:
    """Whoever has a network of 64 bits, as each household has, takes a new address for each connection."""
    everyone = Everyone()
    honest = everyone.comes("2001:db8:0:2::1")
    old = everyone.comes("192.0.2.7")
    crowd = [everyone.comes(f"2001:db8:0:1::{number:x}") for number in range(1, 50)]
    assert {honest, old} & set(everyone.cut) == set()
    assert everyone.cut == crowd[: -LIMITS.per_address]
    assert honest.place == "2001:db8:0:2::/64"
    assert old.place == "192.0.2.7"
    everyone.shows(crowd[-1])
    everyone.goes(crowd[-1])
    assert everyone.admission.of(crowd[-1].peer) is None
