"""An exchange over Flower: stages as messages over a Grid, each one flat byte array."""

import logging
import time
from collections.abc import Callable, Mapping

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from offsite.coordinator.rounds.exchange import cut
from offsite.errors import DataError, MalformedMessage
from offsite.protos.flower import NAME_STAGE, pack, unpack

log = logging.getLogger("offsite.coordinator")
POLL_SECONDS = 0.05
UNAVAILABLE = "Node Unavailable"  # in Flower's error about a site whose heartbeat stopped
# A stage takes milliseconds or hours, and each look asks the SuperLink, so looks get rarer in proportion to the wait.
WAIT_FRACTION, LONGEST_POLL_SECONDS = 0.1, 1.0
Nodes = Callable[[], Mapping[str, int]]


class GridExchange:
    """Sends stages to the sites behind a Flower grid.

    Args:
      grid: Flower's grid of the running server task.
      nodes: returns the ids of the nodes that are connected now, by site; other sites are missing from the replies.
      deadline: seconds that one stage may take.
    """

    def __init__(self, grid: Grid, *, nodes: Nodes, deadline: float) -> None:
        self._grid, self._nodes, self._deadline = grid, nodes, deadline

    def send(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        """Returns the answers that came before the deadline, by site."""
        nodes = self._nodes()
        messages = {site: _message(nodes[site], stage, body) for site, body in payloads.items() if site in nodes}
        return call(self._grid, messages, self._deadline)


def call(grid: Grid, messages: Mapping[str, Message], deadline: float) -> dict[str, bytes]:
    """Sends one message under each name and returns the answers with content that came in time, by name.

    An error of Flower's, such as a node that went away, counts as an answer without content and is not waited for.

    Args:
      grid: Flower's grid of the running server task.
      messages: message by name.
      deadline: seconds to wait for answers.
    """
    identifiers = grid.push_messages(list(messages.values()))
    waiting = {number: name for number, name in zip(identifiers, messages, strict=True) if number is not None}
    answers: dict[str, bytes] = {}
    began = time.monotonic()
    until, late = began + deadline, False
    while waiting and not late:
        late = time.monotonic() >= until  # answers that came until then are still taken
        for reply in grid.pull_messages(list(waiting)):
            name = waiting.pop(reply.metadata.reply_to_message_id, None)
            if name is None:
                continue
            if reply.has_content():
                _take(answers, name, reply.content)
            else:
                log.warning("site %s: %s", name, _meaning(cut(reply.error.reason)))
        if not late:
            now = time.monotonic()
            time.sleep(min(pause(now - began), max(until - now, 0.0)))
    return answers


def _meaning(reason: str) -> str:
    """Returns Flower's error about a message in words for a person at the coordinator."""
    if UNAVAILABLE in reason:
        return "is not connected any more; the job goes on with the site once its client runs again"
    return f"Flower says: {reason}"


def pause(waited: float) -> float:
    """Returns the seconds until the next look for answers, given the seconds since the question left."""
    return min(max(POLL_SECONDS, WAIT_FRACTION * waited), LONGEST_POLL_SECONDS)


def _take(answers: dict[str, bytes], name: str, content: RecordDict) -> None:
    """Keeps an answer; an unreadable answer costs its site this question, since nothing of it is signed yet."""
    try:
        answers[name] = unpack(content)[1]
    except (KeyError, TypeError, ValueError, AttributeError, MalformedMessage) as error:
        log.warning("site %s: its answer is not a stage of offsite (%s)", name, type(error).__name__)


def meet(grid: Grid, *, sites: int, deadline: float) -> dict[str, int]:
    """Asks every node of a simulation for its site, and returns the nodes by site.

    Args:
      grid: Flower's grid of the simulation.
      sites: number of sites to wait for.
      deadline: seconds to wait for the nodes, and again for their answers.

    Raises:
      DataError: fewer nodes than sites came before the deadline.
    """
    until = time.monotonic() + deadline
    while len(nodes := list(grid.get_node_ids())) < sites:
        if time.monotonic() > until:
            raise DataError(f"nodes={len(nodes)}: {sites} sites were expected; start the missing clients")
        time.sleep(POLL_SECONDS)
    names = call(grid, {str(node): _message(node, NAME_STAGE, b"") for node in nodes}, deadline)
    return {body.decode(): int(node) for node, body in names.items()}


def _message(node: int, stage: str, body: bytes) -> Message:
    return Message(content=pack(stage, body), dst_node_id=node, message_type=MessageType.TRAIN)
