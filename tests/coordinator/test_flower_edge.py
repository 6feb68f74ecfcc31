"""Answers from Flower are not signed yet: an unreadable answer costs its own site the question, and no other site."""

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.server.superlink.linkstate.utils import NODE_UNAVAILABLE_ERROR_REASON
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from offsite.coordinator.network.flower_exchange import LONGEST_POLL_SECONDS, _message, call, pause
from offsite.coordinator.rounds.exchange import MAX_REASON_LENGTH
from offsite.protos.flower import pack


class Answering:
    """A grid whose nodes answer at once, each with its given content."""

    def __init__(self, contents: dict[int, RecordDict | Error]) -> None:
        self.contents, self.sent = contents, list[Message]()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.sent = list(messages)
        for number, message in enumerate(self.sent):
            message.metadata.__dict__["_message_id"] = str(number)
        return [message.metadata.message_id for message in self.sent]

    def pull_messages(self, wanted: list[str]) -> list[Message]:
        asked = [message for message in self.sent if message.metadata.message_id in wanted]
        return [Message(self.contents[one.metadata.dst_node_id], reply_to=one) for one in asked]


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"stage": ConfigRecord()}),
        RecordDict({"stage": ConfigRecord({"name": "offer"})}),
        RecordDict({"stage": MetricRecord({"name": 1.0})}),
        RecordDict({"stage": ConfigRecord({"name": "offer"}), "body": ArrayRecord()}),
        RecordDict(
            {
                "stage": ConfigRecord({"name": "offer"}),
                "body": ArrayRecord({"flat": Array("uint8", (4,), "numpy.ndarray", b"none")}),
            }
        ),
        RecordDict(
            {
                "stage": ConfigRecord({"name": "offer"}),
                "body": ArrayRecord({"flat": Array("uint8", (4,), "pickle", np.zeros(4).tobytes())}),
            }
        ),
        Error(code=0, reason="node went away"),
    ],
)
def test_an_answer_that_is_none_costs_nobody_else_theirs(
    content: RecordDict | Error, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):  # a message is written by a task
        monkeypatch.setattr(TaskIdentity, name, 1)
    grid = Answering({1: content, 2: pack("offer", b"honest")})
    messages = {"elm": _message(1, "offer", b""), "ash": _message(2, "offer", b"")}
    assert call(cast(Grid, cast(Any, grid)), messages, 5.0) == {"ash": b"honest"}


def test_what_flower_says_of_a_site_is_cut(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    grid = Answering({1: Error(code=0, reason="\x1b[2J" + "x" * 10**6)})
    assert call(cast(Grid, cast(Any, grid)), {"elm": _message(1, "offer", b"")}, 5.0) == {}
    (said,) = (record.getMessage() for record in caplog.records)
    assert len(said) < 2 * MAX_REASON_LENGTH
    assert said.isprintable()


def test_a_site_that_went_away_is_named_in_plain_words(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The reason is Flower's own, so that a new release with other words is noticed."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    grid = Answering({1: Error(code=0, reason=NODE_UNAVAILABLE_ERROR_REASON)})
    assert call(cast(Grid, cast(Any, grid)), {"elm": _message(1, "offer", b"")}, 5.0) == {}
    assert caplog.messages == [
        "site elm: is not connected any more; the job goes on with the site once its client runs again"
    ]


@pytest.mark.parametrize(("wait", "looks"), [(0.52, 11), (10.0, 45), (3600.0, 3640)])
def test_a_long_stage_is_looked_at_more_rarely_and_never_much_too_late(wait: float, looks: int) -> None:
    waited, count = 0.0, 0
    while waited < wait:
        waited, count = waited + pause(waited), count + 1
    assert count <= looks
    assert waited - wait <= min(max(0.05, 0.1 * wait), LONGEST_POLL_SECONDS)
