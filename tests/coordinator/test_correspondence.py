"""Both ends of the signed exchange joined in memory, with a man in the middle who has no key but every other power."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from offsite.client.network.message_endpoint import SignedEndpoint
from offsite.coordinator.network.signed_exchange import SignedExchange
from offsite.coordinator.rounds.counter import MonotonicCounter
from offsite.coordinator.rounds.exchange import MemoryExchange
from offsite.protos import codec, signed_messages
from offsite.trust.identity import Identity
from tests.memory_federation import federation_of

SITES = ("ash", "birch", "cedar")
Middle = Callable[[str, dict[str, bytes]], dict[str, bytes]]


class Pair:
    """A coordinator's signed exchange and the endpoints of three sites, with a man in the middle on both ways.

    Attributes:
      down: changes the messages on their way to the sites.
      up: changes the answers on their way back.
    """

    def __init__(self, folder: Path, *, tries: int = 1) -> None:
        self.identities = {site: Identity.generate() for site in SITES}
        self.coordinator, self.folder, self.tries = Identity.generate(), folder, tries
        self.federation = federation_of(self.identities, self.coordinator)
        self.handled: list[tuple[str, str, bytes]] = []
        self.bad: list[tuple[str, str]] = []
        self.refused: list[tuple[str, str]] = []
        self.down: Middle = lambda stage, payloads: payloads
        self.up: Middle = lambda stage, replies: replies
        self._memory = MemoryExchange({site: self.endpoint(site).answer for site in SITES})
        self.talk = self.signed_exchange()

    def signed_exchange(self) -> SignedExchange:
        """Returns the coordinator's end; a second call returns the end after a restart."""
        return SignedExchange(
            self,
            self.coordinator,
            self.federation,
            MonotonicCounter(self.folder / "letters.txt", lambda: 1),
            lambda site, reason: self.bad.append((site, reason)),
            tries=self.tries,
        )

    def endpoint(self, site: str) -> SignedEndpoint:
        return SignedEndpoint(
            site,
            self.identities[site],
            coordinator=self.coordinator.public,
            federation=self.federation.digest(),
            memory=self.folder / f"{site}.json",
            handle=lambda stage, body: self._handle(site, stage, body),
            on_refused=lambda reason: self.refused.append((site, reason)),
        )

    def send(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        """Carries messages to the endpoints."""
        return self.up(stage, self._memory.send(stage, self.down(stage, dict(payloads))))

    def ask(self, stage: str = "keys", *sites: str) -> dict[str, bytes]:
        return self.talk.send(stage, {site: f"to {site}".encode() for site in sites or SITES})

    def _handle(self, site: str, stage: str, body: bytes) -> bytes:
        self.handled.append((site, stage, body))
        return f"{site} about {stage}".encode()


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def told(stage: str, *sites: str) -> dict[str, bytes]:
    return {site: f"{site} about {stage}".encode() for site in sites or SITES}


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_questions_and_answers_arrive(pair: Pair) -> None:
    assert pair.ask() == told("keys")
    assert pair.ask("shares", "birch") == told("shares", "birch")
    assert pair.handled == [
        *((site, "keys", f"to {site}".encode()) for site in SITES),
        ("birch", "shares", b"to birch"),
    ]
    assert (pair.bad, pair.refused) == ([], [])


def test_a_coordinator_that_was_started_again_is_still_heard(pair: Pair) -> None:
    assert pair.ask() == told("keys")
    pair.talk = pair.signed_exchange()
    assert pair.ask() == told("keys")
    assert pair.bad == []


def test_a_kept_message_sent_again_is_acted_upon_once(pair: Pair) -> None:
    kept: dict[str, bytes] = {}

    def keep(stage: str, payloads: dict[str, bytes]) -> dict[str, bytes]:
        kept.update(payloads)
        return payloads

    def replay(stage: str, payloads: dict[str, bytes]) -> dict[str, bytes]:
        return {site: kept[site] for site in payloads}

    pair.down = keep
    pair.ask()
    pair.down = replay
    assert pair.ask() == {}
    assert len(pair.handled) == len(SITES)
    assert [site for site, _ in pair.refused] == list(SITES)
    assert all("drop this copy" in reason for _, reason in pair.refused)
    assert [site for site, _ in pair.bad] == list(SITES)
    assert all("an answer to an earlier letter" in reason for _, reason in pair.bad)


def test_messages_that_overtake_each_other(pair: Pair) -> None:
    """The first message is held back until the second opens; the first never opens, and no answer counts twice."""
    held: list[dict[str, bytes]] = []

    def hold(stage: str, payloads: dict[str, bytes]) -> dict[str, bytes]:
        held.append(payloads)
        return {}

    pair.down = hold
    assert pair.ask("keys") == {}
    pair.down = lambda stage, payloads: payloads
    assert pair.ask("shares") == told("shares")
    pair.down = lambda stage, payloads: held[0]
    assert pair.ask("keys") == {}
    assert {stage for _, stage, _ in pair.handled} == {"shares"}


def test_an_answer_to_another_message(pair: Pair) -> None:
    """Old answers have valid signatures, and answer an earlier message of the same stage or of another stage."""
    kept: list[dict[str, bytes]] = []

    def keep(stage: str, replies: dict[str, bytes]) -> dict[str, bytes]:
        kept.append(dict(replies))  # letters are released as they are opened
        return replies

    pair.up = keep
    pair.ask("keys")
    pair.ask("shares")
    for old in kept:
        pair.up = lambda stage, replies, old=old: old
        pair.bad.clear()
        assert pair.ask("keys") == {}
        assert [site for site, _ in pair.bad] == list(SITES)
        assert all("the answer to 'keys'" in reason for _, reason in pair.bad)


def test_the_answer_of_another_site(pair: Pair) -> None:
    pair.up = lambda stage, replies: {
        "ash": replies["birch"],
        "birch": replies["ash"],
        "cedar": replies["cedar"],
    }
    assert pair.ask() == told("keys", "cedar")
    assert [site for site, _ in pair.bad] == ["ash", "birch"]
    assert "sender='birch': 'ash' was expected" in pair.bad[0][1]


def test_the_letter_to_another_site(pair: Pair) -> None:
    pair.down = lambda stage, payloads: payloads | {"ash": payloads["birch"]}
    assert pair.ask() == told("keys", "birch", "cedar")
    assert ("ash", "keys") not in [(site, stage) for site, stage, _ in pair.handled]
    assert "recipient='birch': 'ash' was expected" in pair.refused[0][1]


def test_a_message_of_another_stage(pair: Pair) -> None:
    """The stage that Flower names differs from the stage inside."""

    class Renamed(MemoryExchange):
        def send(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
            return super().send("masked", payloads)

    pair._memory = Renamed({site: pair.endpoint(site).answer for site in SITES})
    assert pair.ask("keys") == {}
    assert pair.handled == []
    assert "the letter inside is about 'keys'" in pair.refused[0][1]


@pytest.mark.parametrize("way", ["down", "up"])
def test_changed_bytes_on_either_way(pair: Pair, way: str) -> None:
    seen: list[bytes] = []

    def look(stage: str, payloads: dict[str, bytes]) -> dict[str, bytes]:
        seen.append(payloads["ash"])
        return payloads

    setattr(pair, way, look)
    pair.ask("keys", "ash")
    for place in range(0, len(seen[0]), 4):  # every byte is changed in tests/protos/test_letters.py
        pair.handled.clear()
        setattr(pair, way, lambda stage, payloads, place=place: {"ash": flipped(payloads["ash"], place)})
        assert pair.ask("keys", "ash") == {}
        assert pair.handled == ([] if way == "down" else [("ash", "keys", b"to ash")])
        setattr(pair, way, lambda stage, payloads, place=place: {"ash": payloads["ash"][:place]})
        assert pair.ask("keys", "ash") == {}
    setattr(pair, way, look)
    assert pair.ask("keys", "ash") == told("keys", "ash")


def test_somebody_without_the_keys_writes_letters_and_answers(pair: Pair) -> None:
    stranger, digest = Identity.generate(), pair.federation.digest()

    def forge(sender: str, recipient: str, number: int) -> bytes:
        return signed_messages.write(
            stranger, digest, sender=sender, recipient=recipient, stage="keys", number=number, body=b"forged"
        )

    pair.down = lambda stage, payloads: {site: forge(signed_messages.COORDINATOR, site, 1 << 60) for site in payloads}
    assert pair.ask() == {}
    assert pair.handled == []
    pair.down = lambda stage, payloads: payloads
    pair.up = lambda stage, replies: {site: forge(site, signed_messages.COORDINATOR, 2) for site in replies}
    assert pair.ask() == {}
    assert all("did not sign" in reason for _, reason in pair.bad[-len(SITES) :])
    pair.up = lambda stage, replies: replies
    assert pair.ask() == told("keys")  # the forged number 1 << 60 was not remembered


def test_a_site_that_does_not_answer_is_missing_and_the_others_are_not(pair: Pair) -> None:
    pair.up = lambda stage, replies: {site: body for site, body in replies.items() if site != "birch"}
    assert pair.ask() == told("keys", "ash", "cedar")
    assert pair.bad == []


def test_only_who_is_missing_is_asked_again_under_a_new_number(tmp_path: Path) -> None:
    pair, lost = Pair(tmp_path, tries=3), ["birch", "birch", "cedar"]
    asked: list[tuple[str, ...]] = []
    numbers: list[int] = []

    def watch(stage: str, payloads: dict[str, bytes]) -> dict[str, bytes]:
        asked.append(tuple(payloads))
        numbers.extend({codec.decode_signed_message(data).number for data in payloads.values()})
        return payloads

    def lose(stage: str, replies: dict[str, bytes]) -> dict[str, bytes]:
        kept = {site: body for site, body in replies.items() if site not in lost}
        for site in replies:
            if site in lost:
                lost.remove(site)
        return kept

    pair.down, pair.up = watch, lose
    assert pair.ask() == told("keys")
    assert asked == [SITES, ("birch", "cedar"), ("birch",)]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 3


def test_a_refusal_is_an_answer_and_is_not_asked_for_again(tmp_path: Path) -> None:
    pair, asked = Pair(tmp_path, tries=3), []
    refusal = codec.encode(codec.Refusal("PolicyRefusal", "hours"))
    pair._handle = lambda site, stage, body: refusal  # type: ignore[method-assign]
    pair.down = lambda stage, payloads: asked.append(tuple(payloads)) or payloads
    assert pair.ask() == dict.fromkeys(SITES, refusal)
    assert asked == [SITES]


def test_every_message_of_one_stage_goes_to_one_site_only(pair: Pair) -> None:
    """All messages of a stage share a number; each message still opens at one site only."""
    seen: dict[str, bytes] = {}
    pair.down = lambda stage, payloads: seen.update(payloads) or {}
    pair.ask()
    assert len({codec.decode_signed_message(data).number for data in seen.values()}) == 1
    for site in SITES:
        for other in SITES:
            pair.handled.clear()
            pair.endpoint(site).answer("keys", seen[other])
            assert bool(pair.handled) == (site == other)


def test_the_same_messages_of_another_epoch_are_refused(pair: Pair, tmp_path: Path) -> None:
    """Keys and sites are the same, and a single term of the manifest differs."""
    other = federation_of(pair.identities, pair.coordinator, max_epsilon=7.0)
    talk = SignedExchange(
        pair,
        pair.coordinator,
        other,
        MonotonicCounter(tmp_path / "letters.txt"),
        lambda site, why: pair.bad.append((site, why)),
    )
    assert talk.send("keys", {"ash": b"x"}) == {}
    assert pair.handled == []
    assert "federation" in pair.refused[0][1]
    assert "federation" in pair.bad[0][1]
