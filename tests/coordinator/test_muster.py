"""How long a job waits for its sites: as long as there is progress, and no longer, whatever a site reports."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count, cycle
from pathlib import Path

import pytest

from offsite.coordinator.home.ledger_heads import Ledgers
from offsite.coordinator.home.status import Status, read_status
from offsite.coordinator.network.readiness import PIECE, TOLD, ReadinessPolicy, ReadinessPoller
from offsite.coordinator.rounds.exchange import MAX_REASON_LENGTH, cut
from offsite.errors import TooFewSurvivors, Untrusted
from offsite.protos import codec
from offsite.trust.federation_manifest import FederationManifest, sign
from offsite.trust.identity import Identity
from tests.memory_federation import federation_of

NAMES = ("ash", "birch", "cedar")
PATIENCE = 100.0
PACKAGE = 64 * PIECE
ENDLESS = 10_000  # number of questions after which a wait counts as endless
NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
Said = codec.OfferReply | codec.Refusal | bytes | None


class Endless(Exception):
    """The wait did not end."""


class Waiting:
    """A readiness poller of three sites whose reports the test chooses, under a clock that advances with each sleep.

    Args:
      folder: folder of status and ledgers.
      says: reports of each site, one per offer; None stands for no answer.
    """

    def __init__(self, folder: Path, says: Mapping[str, Iterator[Said]]) -> None:
        self.identities = {name: Identity.generate() for name in NAMES}
        self.coordinator = Identity.generate()
        self.federation = self.current = federation_of(self.identities, self.coordinator)
        self.says, self.asked, self.time = says, 0, 1000.0
        self.kept: list[str] = []
        self.unopened: dict[str, str] = {}
        self.told: list[str] = []
        self.changes: list[str] = []
        self.path = folder / "status.json"
        self.status = Status(self.path, lambda: NOW)
        self.status.set("waiting for sites")
        self.poller = ReadinessPoller(
            self,
            self.federation,
            self.offer,
            signatures={},
            ledgers=Ledgers(folder / "ledgers.json", self.coordinator),
            status=self.status,
            keep=lambda site, signature: self.kept.append(site),
            unopened=self.unopened,
            current=lambda: self.current,
            on_refusal=self.told.append,
            on_change=self.changes.append,
            clock=lambda: self.time,
            sleep=self.sleep,
        )

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def offer(self, site: str, signatures: Mapping[str, bytes]) -> codec.Offer:
        return codec.Offer(b"job", bytes(64), tuple(signatures.items()), bytes(32), PACKAGE, bytes(8), ())

    def send(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        self.asked += 1
        if self.asked > ENDLESS:
            raise Endless
        said = {site: next(self.says[site]) for site in payloads}
        return {
            site: one if isinstance(one, bytes) else codec.encode(self.signed(site, one))
            for site, one in said.items()
            if one is not None
        }

    def signed(self, site: str, said: codec.OfferReply | codec.Refusal) -> codec.Message:
        if isinstance(said, codec.Refusal) or said.owner_signature:
            return said
        return codec.OfferReply(said.state, said.detail, said.fetched, sign(self.federation, self.identities[site]))

    def wait(self, wanted: int = 3, min_sites: int = 3, patience: float = PATIENCE) -> tuple[str, ...]:
        return self.poller.wait(ReadinessPolicy(wanted, min_sites, patience))

    def waits(self, at_least: float, at_most: float) -> TooFewSurvivors:
        """Asserts that the poller gives up after this number of seconds."""
        began = self.time
        with pytest.raises(TooFewSurvivors) as caught:
            self.wait()
        assert at_least <= self.time - began <= at_most
        return caught.value

    def site(self, name: str) -> dict[str, object]:
        found: dict[str, object] = read_status(self.path)["sites"][name]
        return found


def reply(state: str, fetched: int = 0, detail: str = "", signature: bytes = b"") -> codec.OfferReply:
    return codec.OfferReply(state, detail, fetched, signature)


def sites(ash: Iterator[Said]) -> dict[str, Iterator[Said]]:
    return {"ash": ash, "birch": cycle([reply("ready")]), "cedar": cycle([reply("ready")])}


FLAPPING: dict[str, Callable[[], Iterator[Said]]] = {
    "two states": lambda: cycle([reply("fetching"), reply("waiting")]),
    "there and away": lambda: cycle([reply("waiting"), None]),
    "refused and not": lambda: cycle([codec.Refusal("Untrusted", "no"), reply("fetching")]),
    "what it tells": lambda: (reply("waiting", detail=str(number)) for number in count()),
    "new states": lambda: (reply(f"state {number}") for number in count()),
    "single bytes": lambda: (reply("fetching", number) for number in count()),
    "beyond the package": lambda: (reply("fetching", PACKAGE + number * PIECE) for number in count()),
    "up and down": lambda: cycle([reply("fetching", 0), reply("fetching", 5 * PIECE), reply("waiting", 2 * PIECE)]),
    "no message": lambda: cycle([b"\x00none", reply("fetching")]),
}


@pytest.mark.parametrize("says", FLAPPING.values(), ids=FLAPPING)
def test_a_site_that_comes_no_further_does_not_make_the_wait_endless(
    tmp_path: Path, says: Callable[[], Iterator[Said]]
) -> None:
    Waiting(tmp_path, sites(says())).waits(PATIENCE, PATIENCE + 5)


def test_counting_the_whole_package_up_ends(tmp_path: Path) -> None:
    """A piece each time the patience is nearly over gives the longest wait that a site can cause; this wait ends."""
    slow = (reply("fetching", piece * PIECE) for piece in count() for _ in range(5))
    waiting = Waiting(tmp_path, sites(slow))
    waiting.sleep = lambda seconds: setattr(waiting, "time", waiting.time + PATIENCE / 5)  # type: ignore[method-assign]
    waiting.poller._sleep = waiting.sleep
    waiting.waits(PACKAGE / PIECE * PATIENCE, (PACKAGE / PIECE + 3) * PATIENCE)


def test_a_slow_site_that_fetches_is_waited_for(tmp_path: Path) -> None:
    def fetching() -> Iterator[Said]:
        for piece in range(16):
            for _ in range(150):  # 75 s for each piece, at half a second between two offers
                yield reply("fetching", piece * PIECE)
        yield from cycle([reply("ready", PACKAGE)])

    waiting = Waiting(tmp_path, sites(fetching()))
    began = waiting.time
    assert waiting.wait() == NAMES
    assert waiting.time - began > 10 * PATIENCE
    assert waiting.site("ash")["fetched"] == PACKAGE


def test_each_step_of_a_site_is_progress_once_in_each_wait(tmp_path: Path) -> None:
    """States of the first wait do not count in the second wait, which waits again for sites that come back."""

    def coming() -> Iterator[Said]:
        for state in ("waiting", "fetching", "refused"):
            yield from [reply(state)] * 150
        yield reply("ready")
        for state in ("waiting", "fetching", "refused"):
            yield from [reply(state)] * 150
        yield from cycle([reply("ready")])

    waiting = Waiting(tmp_path, sites(coming()))
    assert waiting.wait() == NAMES
    assert waiting.wait() == NAMES
    assert waiting.time - 1000.0 > 4 * PATIENCE


def test_a_refusal_is_told_at_once_and_once(tmp_path: Path) -> None:
    """The coordinator's terminal shows which site refuses while the wait goes on; changing reasons make no flood."""

    def says() -> Iterator[Said]:
        yield reply("fetching")
        yield from (reply("refused", detail=f"UnsupportedModel: reason {number}") for number in range(20))
        yield from [reply("ready"), reply("refused", detail="DataError: gone")]
        yield from cycle([reply("ready")])

    waiting = Waiting(tmp_path, {**sites(says()), "birch": iter([*[reply("fetching")] * 22, *[reply("ready")] * 5])})
    seen: list[tuple[int, int]] = []
    waiting.poller._sleep = lambda seconds: seen.append((waiting.asked, len(waiting.told)))
    assert waiting.wait() == NAMES
    assert waiting.told == ["site ash refused: UnsupportedModel: reason 0", "site ash refused: DataError: gone"]
    assert seen[:2] == [(1, 0), (2, 1)]
    waiting = Waiting(tmp_path, sites(cycle([codec.Refusal("PolicyRefusal", "not permitted")])))
    waiting.waits(PATIENCE, PATIENCE + 5)
    assert waiting.told == ["site ash refused: PolicyRefusal: not permitted"]
    waiting = Waiting(tmp_path, sites(cycle([None])))
    waiting.waits(PATIENCE, PATIENCE + 5)
    assert waiting.told == []


def test_a_person_hears_how_the_sites_stand_at_each_change_and_only_then(tmp_path: Path) -> None:
    def coming() -> Iterator[Said]:
        yield from [None] * 20
        yield from [reply("waiting", detail="not approved")] * 20
        yield from [reply("fetching", piece * PIECE) for piece in range(20)]
        yield from cycle([reply("ready")])

    waiting = Waiting(tmp_path, sites(coming()))
    assert waiting.wait() == NAMES
    assert waiting.changes == [
        "sites: absent: ash; ready: birch, cedar",
        "sites: ready: birch, cedar; waiting (not approved): ash",
        "sites: fetching: ash; ready: birch, cedar",
        "sites: ready: ash, birch, cedar",
    ]


def test_a_site_that_changes_for_ever_makes_no_flood_of_changes(tmp_path: Path) -> None:
    changing = (reply("waiting", detail=str(number)) for number in count())
    waiting = Waiting(tmp_path, sites(changing))
    waiting.waits(PATIENCE, PATIENCE + 5)
    assert len(waiting.changes) == TOLD
    refusing = (reply("refused", detail=f"DataError: {number}") for number in count())
    waiting = Waiting(tmp_path, sites(refusing))
    waiting.waits(PATIENCE, PATIENCE + 5)
    assert waiting.changes == ["sites: ready: birch, cedar; refused: ash"]


def test_enough_sites_go_on_without_one_that_flaps(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path, sites(cycle([reply("fetching"), None])))
    assert waiting.wait(wanted=3, min_sites=2) == ("birch", "cedar")


def test_ready_without_the_owners_signature_is_refused(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path, sites(cycle([reply("ready", signature=bytes(64))])))
    error = waiting.waits(PATIENCE, PATIENCE + 5)
    assert "sites=2 ready" in str(error)
    assert "has not signed epoch 1" in str(error)
    assert (waiting.site("ash")["state"], set(waiting.kept)) == ("refused", {"birch", "cedar"})


def test_a_state_that_is_none_is_not_shown(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path, sites(cycle([reply("READY\x1b[2J")])))
    error = waiting.waits(PATIENCE, PATIENCE + 5)
    assert waiting.site("ash")["state"] == "refused"
    assert "READY" not in str(error) + waiting.path.read_text()


def test_a_site_cannot_pass_for_one_that_is_away(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path, sites(cycle([reply("absent")])))
    waiting.waits(PATIENCE, PATIENCE + 5)
    assert waiting.site("ash")["state"] == "refused"
    away = Waiting(tmp_path, sites(cycle([None])))
    away.waits(PATIENCE, PATIENCE + 5)
    assert away.site("ash") == {"state": "absent", "detail": "did not answer", "fetched": 0, "seen": None}


def test_why_an_answer_was_not_opened_is_told_once(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path, sites(iter([None, reply("ready")])))
    waiting.unopened["ash"] = "letter: not signed by ash"
    seen: list[object] = []
    waiting.poller._sleep = lambda seconds: seen.append(waiting.site("ash")["detail"])
    assert waiting.wait() == NAMES
    assert seen == ["letter: not signed by ash"]
    assert waiting.unopened == {}


@pytest.mark.parametrize(
    "says",
    [
        reply("waiting", detail="\x1b[31m" + "x" * 10**6),
        reply("waiting", detail="line\nline\r" * 10**5),
        codec.Refusal("K" * 10**6, "y" * 10**6),
        codec.Refusal("Untrusted", "z" * 10**6),
    ],
)
def test_what_a_site_tells_is_cut_before_it_goes_anywhere(tmp_path: Path, says: Said) -> None:
    waiting = Waiting(tmp_path, sites(cycle([says])))
    error = str(waiting.waits(PATIENCE, PATIENCE + 5))
    assert len(error) < 2 * MAX_REASON_LENGTH
    assert error.isprintable()
    detail = str(waiting.site("ash")["detail"])
    assert len(detail) == MAX_REASON_LENGTH
    assert detail.endswith("...")
    assert len(json.dumps(read_status(waiting.path))) < 4 * MAX_REASON_LENGTH


def test_an_unopened_answer_is_cut_too(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path, sites(cycle([None])))
    waiting.unopened["ash"] = "w" * 10**6
    waiting.poller._offer_once()
    assert len(str(waiting.site("ash")["detail"])) == MAX_REASON_LENGTH


def test_what_is_short_is_told_as_it_is() -> None:
    assert cut("DataError: Grüße, x=1") == "DataError: Grüße, x=1"
    assert cut("a\tb\x00c\u202ed") == "a b c d"
    assert cut("x" * MAX_REASON_LENGTH) == "x" * MAX_REASON_LENGTH
    assert cut("x" * (MAX_REASON_LENGTH + 1)) == "x" * (MAX_REASON_LENGTH - 3) + "..."


CHANGED = (
    "epoch=2: the owners' federation changed while this job of epoch 1 was waiting; start a new run with --out FOLDER"
)


def test_another_epoch_ends_the_wait_for_a_signature_in_one_line(tmp_path: Path) -> None:
    """A signature that comes afterwards is of the old epoch, and is not kept under the current epoch."""
    waiting = Waiting(tmp_path, sites(iter([None, None, reply("ready")])))

    def change(seconds: float) -> None:
        if waiting.asked == 2:
            waiting.current = following(waiting.federation)

    waiting.poller._sleep = change
    with pytest.raises(Untrusted) as caught:
        waiting.wait()
    assert str(caught.value) == CHANGED
    assert set(waiting.kept) == {"birch", "cedar"}


def test_another_epoch_does_not_end_a_job_that_all_have_signed(tmp_path: Path) -> None:
    """Sites that moved to the new epoch are missing; where too many sites are missing, the error names the epoch."""
    waiting = Waiting(tmp_path, sites(iter([reply("ready"), *[None] * 50, *[reply("ready")] * 2, *[None] * 1000])))
    assert waiting.wait() == NAMES
    waiting.current = following(waiting.federation)
    assert waiting.wait() == NAMES
    assert waiting.wait() == NAMES
    with pytest.raises(Untrusted) as caught:
        waiting.wait()
    assert str(caught.value) == CHANGED


def following(federation: FederationManifest) -> FederationManifest:
    return replace(federation, epoch=2, previous=federation.digest().hex())
