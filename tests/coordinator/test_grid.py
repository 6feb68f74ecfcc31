"""What a site may put together as its answer: Flower's pieces, real ones, of which some are no message."""

import json
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from coordinator.grid import LOST, GuardedGrid, check_size
from errors import MalformedMessage
from protos.flower import pack, unpack

LARGEST = 4 << 20


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):  # a message is written by a task
        monkeypatch.setattr(TaskIdentity, name, 7)


class SuperLink:
    """The part of a SuperLink that hands answers out."""

    def __init__(self) -> None:
        self.heads, self.trees, self.pieces = list[Any](), list[Any](), dict[str, bytes]()
        self.status = 0

    def holds(self, content: RecordDict, question: str, says: str = "") -> dict[str, Any]:
        """Takes a site's answer to a question; within, it may say that it answers another."""
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
        return SimpleNamespace(messages_list=self.heads, message_object_trees=self.trees)

    def PullObject(self, request: Any) -> Any:
        if self.status:
            http = httpx.Request("POST", "https://127.0.0.1/v1/runtime/pull-object")
            httpx.Response(self.status, request=http).raise_for_status()
        found = self.pieces.get(request.object_id)
        return SimpleNamespace(object_found=found is not None, object_available=True, object_content=found)

    def ConfirmMessageReceived(self, request: Any) -> None:
        pass


@pytest.fixture
def link() -> SuperLink:
    return SuperLink()


@pytest.fixture
def grid(link: SuperLink) -> GuardedGrid:
    made = GuardedGrid("127.0.0.1:1", b"", token="token", secret="secret", largest=LARGEST)
    made._client = cast(Any, link)
    made.set_run(Run.create_empty(run_id=7))
    return made


def answers(grid: GuardedGrid) -> dict[str, bytes | str]:
    """The answer to each question, or why it is none."""
    return {
        one.metadata.reply_to_message_id: unpack(one.content)[1] if one.has_content() else one.error.reason
        for one in grid.pull_messages([])
    }


@pytest.mark.parametrize("size", [10, 1 << 17, LARGEST])
def test_an_honest_answer_comes_through(link: SuperLink, grid: GuardedGrid, size: int) -> None:
    body = np.random.default_rng(0).bytes(size)
    link.holds(pack("masked", body), "q1")
    assert answers(grid) == {"q1": body}


def test_no_site_answers_for_another(link: SuperLink, grid: GuardedGrid) -> None:
    """What a message says of itself was written by its site; whose question it answers, the SuperLink has checked."""
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
    """Such an array of 5 MB would fill the memory once it is put together."""
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
    assert "its answer is none" in str(found["bad"])


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
            grid.pull_messages([])
    else:
        assert f"({status})" in str(answers(grid)["q1"])
