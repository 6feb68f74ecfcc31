"""A running site takes whatever comes from its SuperNode, and stays."""

from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from google.protobuf.message import DecodeError

from offsite.client.network.node import MEANINGS, Node, SuperNodeConfig
from offsite.protos.flower_process import FlowerProcess


class Told:
    """An executor with a SuperNode to which something happens."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def step(self) -> bool:
        raise self.error


def stopping_node(folder: Path, notes: list[tuple[str, str]]) -> Node:
    """Returns a node that stops at once, and gathers its notes."""
    return Node(
        SuperNodeConfig(folder, "127.0.0.1:1", folder / "ca.pem", folder / "node.key", 1),
        lambda stage, body: b"",
        largest=lambda: 0,
        note=lambda kind, reason: notes.append((kind, reason)),
        stopping=lambda: True,
    )


@pytest.mark.parametrize("error", [DecodeError("Mr Smith has flu"), IndexError("Mr Smith"), AttributeError("Smith")])
def test_a_message_that_is_none_does_not_end_a_site(tmp_path: Path, error: Exception) -> None:
    """The log names the message once, without a word of its content."""
    notes: list[tuple[str, str]] = []
    node = stopping_node(tmp_path, notes)
    node._executor = cast(Any, Told(error))
    assert not any(node._step() for _ in range(3))
    ((kind, reason),) = notes
    assert kind == "message not understood"
    assert "test_node.py" in reason
    assert "Smith" not in reason
    node._executor = cast(Any, Told(httpx.ConnectError("refused")))
    assert not node._step()  # a SuperNode that starts is no news
    assert len(notes) == 1


ENDED = """\x1b[92mINFO \x1b[0m:      Starting Flower SuperNode
INFO:     Started server process [5954]
INFO:     Waiting for application startup.
\x1b[92mINFO \x1b[0m:      SuperNode terminated gracefully.
INFO:     Shutting down
\x1b[92mINFO \x1b[0m:      FastAPI lifespan: shutdown
INFO:     Waiting for application shutdown.
INFO:     Finished server process [5954]
"""


def test_the_reason_of_an_end_is_flowers_and_not_its_web_servers(tmp_path: Path) -> None:
    """The log of Flower 1.41 where a site's clock is 20 s ahead, at each line at which a look may come."""
    lines, notes = ENDED.splitlines(keepends=True), list[tuple[str, str]]()
    for end in range(4, len(lines) + 1):
        log = tmp_path / "supernode.log"
        log.write_text("".join(lines[:end]))
        process = FlowerProcess("none", [], log=log, home=tmp_path, environment={})
        assert "SuperNode terminated gracefully." in process.reason(MEANINGS)
    node = stopping_node(tmp_path, notes)
    for _ in range(2):
        node._note_end(process.reason(MEANINGS))
    ((kind, reason),) = notes
    assert kind == "supernode ended"
    assert "is the clock off" in reason
    assert "offsite client doctor" in reason
