"""The answers that a site may construct from real pieces of Flower; some answers do not make a message."""

import json
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from offsite.coordinator.network.flower_grid import LOST, GuardedGrid
from offsite.errors import MalformedMessage
from offsite.protos.flower import pack, unpack
from offsite.protos.flower_pieces import check_size

LARGEST = 4 << 20


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):  # a message is written by a task
        monkeypatch.setattr(TaskIdentity, name, 7)


class SuperLink:
    """The part of a SuperLink that hands out answers."""

    def __init__(self) -> None:
        self.heads, self.trees, self.pieces = list[Any](), list[Any](), dict[str, bytes]()
        self.status, self.poisoned = 0, ""
        self.late, self.pushed = set[str](), list[list[Any]]()

    def holds(self, content: RecordDict, question: str, says: str = "") -> dict[str, Any]:
        """Takes a site's answer to a question; inside, the answer may name another question."""
        asked = Message(content=RecordDict(), dst_node_id=1, message_type=MessageType.TRAIN)
        asked.metadata.__dict__["_message_id"] = says or question
        answer = Message(content, reply_to=asked)
        objects = get_all_nested_objects(answer)
        self.pieces |= {name: one.deflate() for name, one in objects.items()}
        answer.metadata.__dict__["_message_id"] = answer.object_id
        head = message_to_proto(answer)
        head.metadata.reply_to_message_id = question
        self.heads.append(head)
        self.trees.append(get_object_tree(answer))
        return objects

    def PullMessages(self, request: Any) -> Any:
        wanted = list(request.message_ids)
        if self.poisoned in wanted:
            answered(500)
        found = [place for place, head in enumerate(self.heads) if head.metadata.reply_to_message_id in wanted]
        heads, trees = [self.heads[place] for place in found], [self.trees[place] for place in found]
        for place in reversed(found):  # each answer is delivered once
            del self.heads[place], self.trees[place]
        return SimpleNamespace(messages_list=heads, message_object_trees=trees)

    def PullObject(self, request: Any) -> Any:
        if self.status:
            answered(self.status)
        found = self.pieces.get(request.object_id)
        here = request.object_id not in self.late
        return SimpleNamespace(object_found=found is not None, object_available=here, object_content=found)

    def ConfirmMessageReceived(self, request: Any) -> None:
        pass


def answered(status: int) -> None:
    http = httpx.Request("POST", "https://127.0.0.1/v1/runtime")
    httpx.Response(status, request=http).raise_for_status()


@pytest.fixture
def link() -> SuperLink:
    return SuperLink()


@pytest.fixture
def grid(link: SuperLink) -> GuardedGrid:
    made = GuardedGrid("127.0.0.1:1", b"", token="token", secret="secret", largest=LARGEST)
    made._client = cast(Any, link)
    made.set_run(Run.create_empty(run_id=7))
    return made


def answers(grid: GuardedGrid, *asked: str) -> dict[str, bytes | str]:
    """Returns the answer to each question, or the reason why it has no valid answer."""
    asked = asked or ("q1", "bad", "good", "to elm", "to ash")
    return {
        one.metadata.reply_to_message_id: unpack(one.content)[1] if one.has_content() else one.error.reason
        for one in grid.pull_messages(asked)
    }


@pytest.mark.parametrize("size", [10, 1 << 17, LARGEST])
def test_an_honest_answer_comes_through(link: SuperLink, grid: GuardedGrid, size: int) -> None:
    body = np.random.default_rng(0).bytes(size)
    link.holds(pack("masked", body), "q1")
    assert answers(grid) == {"q1": body}


def test_no_site_answers_for_another(link: SuperLink, grid: GuardedGrid) -> None:
    """A site writes what its message claims; the SuperLink has checked which question the message answers."""
    link.holds(pack("offer", b"elm's"), "to elm", says="to ash")
    link.holds(pack("offer", b"ash's"), "to ash")
    assert answers(grid) == {"to elm": b"elm's", "to ash": b"ash's"}


def flat(size: int) -> RecordDict:
    array = Array(np.random.default_rng(1).integers(0, 255, size, dtype=np.uint8))
    return RecordDict({"stage": ConfigRecord({"name": "masked"}), "body": ArrayRecord({"flat": array})})


def test_too_many_pieces_are_not_even_fetched(link: SuperLink, grid: GuardedGrid) -> None:
    many = {str(n): Array(np.full(2, n, dtype=np.uint8)) for n in range(40)}
    link.holds(RecordDict({"stage": ConfigRecord({"name": "masked"}), "body": ArrayRecord(many)}), "bad")
    link.holds(pack("offer", b"honest"), "good")
    pulled: list[str] = []
    original = link.PullObject
    link.PullObject = lambda request: (pulled.append(request.object_id), original(request))[1]  # type: ignore[method-assign]
    found = answers(grid)
    assert found["good"] == b"honest"
    assert "pieces=" in str(found["bad"])
    assert len(pulled) < 10


def test_pieces_that_are_too_long_are_put_together_nowhere(link: SuperLink, grid: GuardedGrid) -> None:
    link.holds(flat(60 << 20), "bad")
    link.holds(pack("offer", b"honest"), "good")
    found = answers(grid)
    assert found["good"] == b"honest"
    assert "bytes=" in str(found["bad"])


def test_one_piece_named_a_million_times_is_refused() -> None:
    """An array of this kind has 5 MB, and would fill the memory when its pieces are put together."""
    array = Array(np.zeros(1 << 20, dtype=np.uint8))
    contents = {name: one.deflate() for name, one in get_all_nested_objects(array).items()}
    check_size(contents, LARGEST)
    (name,) = (one for one, content in contents.items() if content.startswith(b"Array "))
    head, body = contents[name].split(b"\x00", 1)
    bomb = json.loads(body) | {"arraychunk_ids": [0] * 10**6}
    with pytest.raises(MalformedMessage, match=r"bytes=\d{12}"):
        check_size(contents | {name: head + b"\x00" + json.dumps(bomb).encode()}, LARGEST)


@pytest.mark.parametrize("damage", [b"", b"\x00", b"Message , 0\x00", b"Pickle  3\x00abc", b"Array  2\x00{}"])
def test_a_damaged_piece_costs_nobody_else_their_answer(link: SuperLink, grid: GuardedGrid, damage: bytes) -> None:
    for name in link.holds(flat(100), "bad"):
        link.pieces[name] = damage
    link.holds(pack("offer", b"honest"), "good")
    found = answers(grid)
    assert found["good"] == b"honest"
    assert "its answer is not a valid message" in str(found["bad"])


def test_pieces_that_never_came_cost_nobody_else_their_answer(link: SuperLink, grid: GuardedGrid) -> None:
    for name in link.holds(flat(100), "bad"):
        del link.pieces[name]
    link.holds(pack("offer", b"honest"), "good")
    found = answers(grid)
    assert found["good"] == b"honest"
    assert "ObjectPullError" in str(found["bad"])


def test_another_object_is_no_message(link: SuperLink, grid: GuardedGrid) -> None:
    objects = link.holds(flat(100), "bad")
    (record,) = (name for name, one in objects.items() if isinstance(one, RecordDict))
    link.heads[0].metadata.message_id = record
    assert "RecordDict: a message was announced" in str(answers(grid)["bad"])


@pytest.mark.parametrize(("status", "lost"), [(401, True), (403, True), (503, True), (400, False), (500, False)])
def test_a_lost_link_is_told_from_a_bad_answer(link: SuperLink, grid: GuardedGrid, status: int, lost: bool) -> None:
    link.holds(pack("offer", b"x"), "q1")
    link.status = status
    if lost:
        with pytest.raises(LOST):
            grid.pull_messages(["q1"])
    else:
        assert f"({status})" in str(answers(grid)["q1"])


def test_an_answer_on_its_way_keeps_nobody_waiting(link: SuperLink, grid: GuardedGrid) -> None:
    """No piece of the answer is fetched twice either."""
    body = np.random.default_rng(0).bytes(1 << 17)
    link.late = set(list(link.holds(pack("masked", body), "bad"))[1:])
    link.holds(pack("offer", b"honest"), "good")
    pulled: list[str] = []
    original = link.PullObject
    link.PullObject = lambda request: (pulled.append(request.object_id), original(request))[1]  # type: ignore[method-assign]
    assert answers(grid, "bad", "good") == {"good": b"honest"}
    assert answers(grid, "bad") == {}
    link.late.clear()
    assert answers(grid, "bad") == {"bad": body}
    assert all(pulled.count(piece) <= 3 for piece in pulled)
    link.late = set(link.holds(pack("masked", body[::-1]), "bad"))
    assert answers(grid, "bad") == {}
    link.late.clear()
    assert answers(grid, "good") == {}  # the question was given up
    assert answers(grid, "bad") == {}


def test_an_answer_on_which_the_superlink_fails_costs_its_site_alone(link: SuperLink, grid: GuardedGrid) -> None:
    """A time to live that is not a number breaks every poll that names its question."""
    link.holds(pack("offer", b"honest"), "good")
    link.poisoned = "bad"
    assert answers(grid, "bad", "good", "q1") == {"bad": "the SuperLink fails on its answer (500)", "good": b"honest"}


def test_a_superlink_that_fails_on_everything_is_lost(link: SuperLink, grid: GuardedGrid) -> None:
    link.PullMessages = lambda request: answered(500)  # type: ignore[method-assign]
    with pytest.raises(LOST):
        grid.pull_messages(["q1", "q2"])


def test_a_site_that_takes_its_question_away_costs_nobody_theirs(
    grid: GuardedGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site can end the session in which its question is pushed; each question has a session of its own."""
    sessions: list[int] = []

    def pushed(self: HttpGrid, run_id: int, messages: list[Message]) -> list[str]:
        sessions.append(len(messages))
        if messages[0].metadata.dst_node_id == 2:
            raise ObjectPushError("piece", run_id, "session")
        return [one.metadata.message_id for one in messages]

    monkeypatch.setattr(HttpGrid, "_try_push_messages", pushed)
    asked = [Message(content=pack("offer", b"x"), dst_node_id=node, message_type="train") for node in (1, 2, 3)]
    names = grid.push_messages(asked)
    assert [name is None for name in names] == [False, True, False]
    assert sessions == [1, 1, 1]
