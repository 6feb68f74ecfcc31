"""Flower's grid as we need it: our secret on each request, tries that end, and answers that cost their site alone.

Written against flwr 1.41; `tests/coordinator/test_grid.py` and `test_link.py` are what a newer Flower has to pass.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import httpx
from flwr.app import Array, Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import MAX_RETRY_DELAY, ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid.http_grid import HttpGrid

from offsite.errors import MalformedMessage
from offsite.protos.codec import MAX_BYTES
from offsite.protos.guard import Secret

log = logging.getLogger("offsite.coordinator")
LOST_SECONDS = 20.0
LOST = (httpx.TransportError, httpx.HTTPStatusError)  # what a link raises that has to be started again
PIECE, SPARE_PIECES = 1 << 20, 16  # Flower moves an answer in pieces of 1 to 5 MiB, and a few small ones around them
_PASSING = (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT)
_ENDED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


class GuardedGrid(HttpGrid):
    """Flower's grid, through our guard.

    Args:
      address: host:port of the SuperLink.
      ca: PEM bytes of its authority.
      token: of the run.
      secret: of this machine.
      largest: bytes of the longest answer that an honest site gives.
    """

    def __init__(self, address: str, ca: bytes, *, token: str, secret: str, largest: int = MAX_BYTES) -> None:
        super().__init__(address, root_certificates=ca, token=token)
        self._secret, self._largest = secret, largest
        self._incoming: dict[str, _Incoming] = {}
        self._retry_invoker = retries()

    def _connect(self) -> None:
        self._client = RuntimeHttpClient.from_server_address(
            server_address=self._addr,
            insecure=False,
            root_certificates=self._cert,
            interceptors=[
                self._tracing,
                Secret(self._secret),
                RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"),
                RuntimeTokenHttpInterceptor(token=self._token),
            ],
            retry_invoker=self._retry_invoker,
        )

    def push_messages(self, messages: Iterable[Message]) -> list[Any]:
        """Returns the name of each question, None for one that could not be asked.

        Each has a session of its own: of one that all share, a site can take the pieces of the others away.

        Raises:
          httpx.HTTPError: the SuperLink is gone, or has ended the run.
        """
        return [self._pushed(message) for message in messages]

    def _pushed(self, message: Message) -> str | None:
        try:
            return next(iter(super().push_messages([message])), None)
        except ObjectPushError:
            log.warning("node %d: could not be asked; is the SuperLink's disk full", message.metadata.dst_node_id)
            return None

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Returns the answers that are whole, one that is too large or no message as an error of its site's.

        Flower's own waits for the pieces of an answer while others come, and raises for all answers of a poll what is
        wrong with one of them, which it has then delivered.

        Raises:
          httpx.HTTPError: the SuperLink is gone, or has ended the run.
        """
        asked = list(message_ids)
        self._incoming = {one: self._incoming[one] for one in asked if one in self._incoming}
        failed = self._announce([one for one in asked if one not in self._incoming])
        found = [self._none(one, why) for one, why in failed.items()]
        for question in list(self._incoming):
            message = self._answer(question)
            if message is not None:
                del self._incoming[question]
                found.append(message)
        return found

    def _announce(self, asked: list[str]) -> dict[str, str]:
        """Learns which answers are there; returns those that even their heads make the SuperLink fail on, and why."""
        if not asked:
            return {}
        try:
            found = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=asked))
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (*_ENDED, *_PASSING):
                raise
            if len(asked) == 1:
                return {asked[0]: f"the SuperLink fails on its answer ({error.response.status_code})"}
            parts = [self._announce([one]) for one in asked]
            if all(parts):
                raise  # it is the SuperLink
            return {one: why for part in parts for one, why in part.items()}
        for head, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            self._incoming[head.metadata.reply_to_message_id] = _Incoming(head.metadata.message_id, tree)
        return {}

    def _answer(self, question: str) -> Message | None:
        """Returns the answer to a question, None while pieces of it are on their way."""
        try:
            message = self._inflated(self._incoming[question])
        except ObjectUnavailableError:
            return None
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (*_ENDED, *_PASSING):
                raise
            return self._none(question, f"its pieces cannot be had ({error.response.status_code})")
        except httpx.TransportError:
            raise
        except Exception as error:  # whatever a site may have put together
            reason = str(error) if isinstance(error, MalformedMessage) else type(error).__name__
            return self._none(question, f"its answer is none ({reason})")
        # What stands inside is the site's own word, and could name the question to another site.
        message.metadata.__dict__["_reply_to_message_id"] = question
        return message

    def _inflated(self, incoming: "_Incoming") -> Message:
        """Returns an answer.

        Raises:
          ObjectUnavailableError: a piece is not there yet.
          MalformedMessage: it is none.
        """
        most = self._largest + SPARE_PIECES * PIECE
        incoming.check(self._largest // PIECE + SPARE_PIECES)
        pull = make_pull_object_fn_protobuf(self._runtime_client.PullObject, self.node, self._run_id)
        for piece in incoming.missing():
            incoming.take(piece, pull(piece), most)
        check_size(incoming.contents, most)
        self._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=self._run_id, message_object_id=incoming.name)
        )
        message = inflate_object_from_contents(incoming.name, incoming.contents)
        if not isinstance(message, Message):
            raise MalformedMessage(f"object={type(message).__name__}: a message was announced")
        message.metadata.__dict__["_message_id"] = incoming.name
        return message

    @property
    def _run_id(self) -> int:
        return int(self.run.run_id)

    def _none(self, question: str, reason: str) -> Message:
        """Returns what Flower itself returns for an answer that never came."""
        metadata = Metadata(
            run_id=self._run_id,
            message_id="",
            src_node_id=self.node.node_id,
            dst_node_id=self.node.node_id,
            message_type=SYSTEM_MESSAGE_TYPE,
            group_id="",
            ttl=0,
            reply_to_message_id=question,
            created_at=now().timestamp(),
        )
        return make_message(metadata, error=Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason=reason))


class _Incoming:
    """An answer on its way: the pieces that it has and those that it still lacks.

    Args:
      name: of the message.
      tree: its pieces as they were announced.
    """

    def __init__(self, name: str, tree: ObjectTree) -> None:
        self.name, self._tree = name, tree
        self.contents: dict[str, bytes] = {}
        self._bytes = 0

    def check(self, most: int) -> None:
        """Refuses more pieces than an answer has."""
        if len(list(islice(iterate_object_tree(self._tree), most + 1))) > most:
            raise MalformedMessage(f"pieces={most + 1} or more: at most {most} make an answer to this job")

    def missing(self) -> Iterator[str]:
        """Yields what is still to be fetched."""
        for one in iterate_object_tree(self._tree):
            if one.object_id not in self.contents:
                yield one.object_id

    def take(self, piece: str, content: bytes, most: int) -> None:
        """Keeps a piece, as long as all of them have at most so many bytes."""
        self._bytes += len(content)
        if self._bytes > most:
            raise MalformedMessage(f"bytes={self._bytes} or more: at most {most} make an answer to this job")
        self.contents[piece] = content


def check_size(contents: dict[str, bytes], most: int) -> None:
    """Refuses pieces that would take more memory than allowed, put together: an array may name one piece many times.

    Raises:
      MalformedMessage: they would.
    """
    total = sum(map(len, contents.values()))
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            named = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            total += sum(len(contents[children[one]]) for one in named)
    if total > 2 * most:  # each piece counts by itself and in its array
        raise MalformedMessage(f"bytes={total}: at most {2 * most} make an answer to this job")


def why_lost(error: Exception) -> str:
    """Returns in a few words why a link was lost, from one of `LOST`."""
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in _ENDED:
        return "it ended our run; was this machine asleep for a minute"
    if isinstance(error, httpx.HTTPStatusError):
        return f"it answered {error.response.status_code}"
    return type(error).__name__


def retries() -> RetryInvoker:
    """Returns how a call is tried again, and for how long.

    Flower's own retries go on for ever, also where the SuperLink has died; on 401 they send this process an interrupt,
    which would read as a person's, and on 403 they raise what no `except Exception` catches. Both are answers that a
    SuperLink gives for a run that missed its heartbeats.
    """
    return RetryInvoker(
        lambda: exponential(max_delay=MAX_RETRY_DELAY),
        LOST,
        max_tries=None,
        max_time=LOST_SECONDS,
        should_giveup=lambda error: (
            isinstance(error, httpx.HTTPStatusError) and error.response.status_code not in _PASSING
        ),
    )
