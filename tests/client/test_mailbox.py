"""A site's signed endpoint: each letter once and in order, only from its coordinator, and only if remembered."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offsite.client.home.redact import REFUSALS
from offsite.client.network.message_endpoint import SignedEndpoint
from offsite.errors import PolicyRefusal
from offsite.protos import codec, signed_messages
from offsite.trust.identity import Identity

ROOT = Path(__file__).resolve().parents[2]
SITE, COORDINATOR, STRANGER = (Identity.from_bytes(bytes([byte]) * 32) for byte in (1, 2, 3))
FEDERATION = bytes(range(32))
REPLY = codec.encode(codec.TrainReply(1))


class Box:
    """An endpoint with a handler that keeps every message."""

    def __init__(self, folder: Path, handle: Callable[[str, bytes], bytes] | None = None) -> None:
        self.memory, self.handled, self.refused = folder / "letters.json", list[tuple[str, bytes]](), list[str]()
        self.endpoint = SignedEndpoint(
            "ash",
            SITE,
            coordinator=COORDINATOR.public,
            federation=FEDERATION,
            memory=self.memory,
            handle=handle or self._handle,
            on_refused=self.refused.append,
        )

    def answer(self, data: bytes, stage: str = "keys") -> codec.SignedMessage:
        """The answer to a letter, opened as the coordinator opens it."""
        reply = self.endpoint.answer(stage, data)
        return signed_messages.read(
            reply, FEDERATION, sender="ash", key=SITE.public, recipient=signed_messages.COORDINATOR
        )

    def refuses(self, data: bytes, match: str, stage: str = "keys") -> codec.SignedMessage:
        """Asserts that a letter is not opened, that its sender learns the kind alone, and that nothing counts."""
        handled, kept = list(self.handled), self.memory.read_bytes() if self.memory.exists() else None
        letter = self.answer(data, stage)
        message = codec.decode(letter.body)
        assert isinstance(message, codec.Refusal)
        assert message.reason == REFUSALS[message.kind]
        assert self.refused[-1].startswith(f"{message.kind}: ")
        assert match in self.refused[-1]
        assert self.handled == handled
        assert (self.memory.read_bytes() if self.memory.exists() else None) == kept
        return letter

    def _handle(self, stage: str, body: bytes) -> bytes:
        self.handled.append((stage, body))
        return REPLY


def letter(number: int, *, key: Identity = COORDINATOR, **changed: object) -> bytes:
    terms: dict[str, object] = {
        "sender": signed_messages.COORDINATOR,
        "recipient": "ash",
        "stage": "keys",
        "body": b"body",
    }
    terms |= {"federation": FEDERATION, "number": number}
    return signed_messages.write(key, **(terms | changed))


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_an_answer_repeats_stage_and_number(box: Box) -> None:
    reply = box.answer(letter(41))
    assert (reply.stage, reply.number, reply.body, reply.recipient) == ("keys", 41, REPLY, signed_messages.COORDINATOR)
    assert box.handled == [("keys", b"body")]
    assert json.loads(box.memory.read_text()) == {"last": 41}
    assert not box.refused


def test_a_copy_is_not_opened_again_also_after_a_restart(box: Box, tmp_path: Path) -> None:
    copy = letter(41)
    box.answer(copy)
    box.refuses(copy, "number=41: 41 was opened already")
    Box(tmp_path).refuses(copy, "number=41: 41 was opened already")
    box.answer(letter(42))
    box.refuses(copy, "number=41: 42 was opened already")
    assert len(box.handled) == 2


@settings(max_examples=50)
@given(st.permutations(range(1, 9)), st.sets(st.integers(0, 7)))
def test_in_any_order_only_numbers_that_go_up_are_opened(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], restarts: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("box")
    box, opened, last = Box(folder), [], 0
    for place, number in enumerate(order):
        if place in restarts:
            opened, box = opened + box.handled, Box(folder)
        box.answer(letter(number, body=bytes([number])))
    opened += box.handled
    expected = []
    for number in order:  # records: numbers above everything before them
        if number > last:
            expected.append(("keys", bytes([number])))
            last = number
    assert opened == expected


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"key": STRANGER}, "did not sign"),
        ({"key": SITE}, "did not sign"),
        ({"recipient": "birch"}, "recipient='birch': 'ash' was expected"),
        ({"sender": "ash"}, "sender='ash': 'coordinator' was expected"),
        ({"sender": "birch"}, "sender='birch': 'coordinator' was expected"),
        ({"federation": bytes(32)}, "federation=000000000000"),
        ({"stage": "masked"}, "the letter inside is about 'masked'"),
    ],
    ids=str,
)
def test_what_the_coordinator_did_not_write_to_this_site(box: Box, changed: dict[str, object], match: str) -> None:
    box.answer(letter(1))
    box.refuses(letter(2, **changed), match)
    assert box.answer(letter(2)).body == REPLY  # the number is still unused


def test_every_changed_or_missing_byte(box: Box) -> None:
    data = letter(9)
    for place in range(len(data)):
        altered = bytearray(data)
        altered[place] ^= 1 << place % 8
        box.refuses(bytes(altered), "")
        box.refuses(data[:place], "")
    assert box.answer(data).body == REPLY


def test_a_letter_that_is_not_read_is_answered_without_its_number(box: Box) -> None:
    """Such an answer belongs to no letter; the coordinator drops the answer and asks again."""
    assert box.refuses(letter(9, key=STRANGER), "did not sign").number == 0
    assert box.refuses(b"", "").number == 0
    box.answer(letter(9))
    assert box.refuses(letter(9), "opened already").number == 9


def test_a_refusal_of_the_site_is_its_signed_answer(tmp_path: Path) -> None:
    def handle(stage: str, body: bytes) -> bytes:
        raise PolicyRefusal("hours=any: the reason; the next step")

    box = Box(tmp_path, handle)
    reply = box.answer(letter(5))
    assert codec.decode(reply.body) == codec.Refusal("PolicyRefusal", REFUSALS["PolicyRefusal"])
    assert box.refused == ["PolicyRefusal: hours=any: the reason; the next step"]
    box.refuses(letter(5), "opened already")


def test_a_letter_is_remembered_before_it_is_acted_upon(tmp_path: Path) -> None:
    """Killed in the handler, the site must not act a second time on the same letter."""

    def handle(stage: str, body: bytes) -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Box(tmp_path, handle).answer(letter(5))
    box = Box(tmp_path)
    box.refuses(letter(5), "5 was opened already")
    assert box.answer(letter(6)).body == REPLY


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[]", b"null", b'{"last": null}', b'{"last": "x"}', b'{"last": [1]}', b"\xff"]
)
def test_with_a_damaged_memory_no_letter_is_opened(box: Box, content: bytes) -> None:
    box.memory.write_bytes(content)
    box.refuses(letter(9), "letters.json: damaged")
    box.refuses(letter(2**63), "letters.json: damaged")


def test_every_truncation_of_the_memory_opens_no_letter(box: Box) -> None:
    box.answer(letter(123456))
    whole = box.memory.read_bytes()
    for length in range(len(whole)):
        box.memory.write_bytes(whole[:length])
        box.refuses(letter(200000), "letters.json: damaged")


def test_a_memory_that_cannot_be_written_opens_no_letter(box: Box) -> None:
    box.answer(letter(1))
    partial = box.memory.with_name(f".letters.json.{os.getpid()}.partial")
    partial.mkdir()
    box.refuses(letter(2), "letters.json: cannot be written")
    partial.rmdir()
    assert box.answer(letter(2)).body == REPLY


FULL = """
import resource, signal, sys
from pathlib import Path
from tests.client.test_mailbox import REPLY, Box, letter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
box = Box(Path(sys.argv[1]))
assert box.answer(letter(1)).body == REPLY
for limit in range(11):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    box.refuses(letter(2), "letters.json: cannot be written (File too large); free disk space")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
box.refuses(letter(1), "1 was opened already")
assert box.answer(letter(2)).body == REPLY
assert len(box.handled) == 2
"""


def test_on_a_full_disk_no_letter_is_opened_and_none_is_lost(tmp_path: Path) -> None:
    """A real process with files that may not grow: the site refuses, and its memory stays the same byte for byte."""
    process = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "letters.json").read_text()) == {"last": 2}
