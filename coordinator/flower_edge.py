"""The Flower form of an exchange: stages as messages over a Grid, one flat byte array each."""

import time
from collections.abc import Mapping

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from errors import DataError
from protos.flower import NAME_STAGE, pack, unpack

POLL_SECONDS = 0.05


class GridExchange:
    """Sends stages to the sites behind a Flower grid.

    Args:
      grid: Flower's grid of the running server task.
      sites: how many sites must have connected before the first round.
      deadline: seconds that one stage may take.
    """

    def __init__(self, grid: Grid, *, sites: int, deadline: float) -> None:
        self._grid, self._deadline = grid, deadline
        self._nodes = self._meet(sites)

    def send(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        """Returns the answers that came before the deadline, by site."""
        sent = {self._nodes[site]: (stage, body) for site, body in payloads.items()}
        names = {node: site for site, node in self._nodes.items()}
        return {names[node]: body for node, body in self._call(sent).items()}

    def _meet(self, sites: int) -> dict[str, int]:
        """Asks every node which site it is, and returns the nodes by site."""
        until = time.monotonic() + self._deadline
        while len(nodes := list(self._grid.get_node_ids())) < sites:
            if time.monotonic() > until:
                raise DataError(f"nodes={len(nodes)}: {sites} sites were expected; start the missing clients")
            time.sleep(POLL_SECONDS)
        answers = self._call(dict.fromkeys(nodes, (NAME_STAGE, b"")))
        return {body.decode(): node for node, body in answers.items()}

    def _call(self, payloads: Mapping[int, tuple[str, bytes]]) -> dict[int, bytes]:
        messages = [
            Message(content=pack(stage, body), dst_node_id=node, message_type=MessageType.TRAIN)
            for node, (stage, body) in payloads.items()
        ]
        waiting = set(self._grid.push_messages(messages))
        answers: dict[int, bytes] = {}
        until = time.monotonic() + self._deadline
        while waiting and time.monotonic() < until:
            for reply in self._grid.pull_messages(list(waiting)):
                waiting.discard(reply.metadata.reply_to_message_id)
                if reply.has_content():
                    answers[reply.metadata.src_node_id] = unpack(reply.content)[1]
            time.sleep(POLL_SECONDS)
        return answers
