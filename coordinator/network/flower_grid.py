"""Flower's grid for our needs: our secret on each request, retries that end, and bad answers that cost only their site.

Written against flwr 1.41; a newer Flower has to pass `tests/coordinator/test_grid.py` and `test_link.py`.
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
LOST = (httpx.TransportError, httpx.HTTPStatusError)  # exceptions after which a link has to be started again
PIECE, SPARE_PIECES = 1 << 20, 16  # Flower moves an answer in pieces of 1 to 5 MiB, and a few small ones around them
_PASSING = (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT)
_ENDED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


class GuardedGrid(HttpGrid):
    """Flower's grid, through our guard.

    Args:
      address: host:port of the SuperLink.
      ca: certificate of the SuperLink's authority, PEM bytes.
      token: token of the run.
      secret: secret of this machine.
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
        """Returns the id of each question, None for a question that could not be asked.

        Each question has a session of its own: in a shared session, a site can take away the pieces of the others.

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
        """Returns the complete answers; an answer that is too large or no message becomes an error message of its site.

        Flower's own method waits for the pieces of one answer while others come in. If one answer of a poll is wrong,
        it raises for all of them, though it has marked them as delivered.

        Raises:
          httpx.HTTPError: the SuperLink is gone, or has ended the run.
        """
        asked = list(message_ids)
        self._incoming = {question: self._incoming[question] for question in asked if question in self._incoming}
        failed = self._announce([question for question in asked if question not in self._incoming])
        answers = [self._none(question, why) for question, why in failed.items()]
        for question in list(self._incoming):
            message = self._answer(question)
            if message is not None:
                del self._incoming[question]
                answers.append(message)
        return answers

    def _announce(self, asked: list[str]) -> dict[str, str]:
        """Learns which answers have arrived; returns, by question, why the SuperLink fails even on an answer's head."""
        if not asked:
            return {}
        try:
            pulled = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=asked))
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (*_ENDED, *_PASSING):
                raise
            if len(asked) == 1:
                return {asked[0]: f"the SuperLink fails on its answer ({error.response.status_code})"}
            parts = [self._announce([question]) for question in asked]
            if all(parts):
                raise  # the SuperLink itself fails
            return {question: why for part in parts for question, why in part.items()}
        for head, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
            self._incoming[head.metadata.reply_to_message_id] = _Incoming(head.metadata.message_id, tree)
        return {}

    def _answer(self, question: str) -> Message | None:
        """Returns the answer to a question; None while pieces of the answer are on their way."""
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
        except Exception as error:  # a site may have put together anything
            reason = str(error) if isinstance(error, MalformedMessage) else type(error).__name__
            return self._none(question, f"its answer is not a valid message ({reason})")
        # The id inside is the site's own claim, and could name the question to another site.
        message.metadata.__dict__["_reply_to_message_id"] = question
        return message

    def _inflated(self, incoming: "_Incoming") -> Message:
        """Returns a complete answer.

        Raises:
          ObjectUnavailableError: a piece has not arrived yet.
          MalformedMessage: the answer is too large or no message.
        """
        limit = self._largest + SPARE_PIECES * PIECE
        incoming.check(self._largest // PIECE + SPARE_PIECES)
        pull = make_pull_object_fn_protobuf(self._runtime_client.PullObject, self.node, self._run_id)
        for piece in incoming.missing():
            incoming.take(piece, pull(piece), limit)
        check_size(incoming.contents, limit)
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
        """Returns the error message that Flower itself gives for an answer that never came."""
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
    """An answer on its way: the pieces that have arrived and the pieces that are still missing.

    Args:
      name: id of the message.
      tree: ids of the message's pieces, as the SuperLink announced them.
    """

    def __init__(self, name: str, tree: ObjectTree) -> None:
        self.name, self._tree = name, tree
        self.contents: dict[str, bytes] = {}
        self._bytes = 0

    def check(self, limit: int) -> None:
        """Refuses an answer with more than `limit` pieces."""
        if len(list(islice(iterate_object_tree(self._tree), limit + 1))) > limit:
            raise MalformedMessage(f"pieces={limit + 1} or more: at most {limit} make an answer to this job")

    def missing(self) -> Iterator[str]:
        """Yields the ids of the pieces that have not arrived."""
        for piece in iterate_object_tree(self._tree):
            if piece.object_id not in self.contents:
                yield piece.object_id

    def take(self, piece: str, content: bytes, limit: int) -> None:
        """Keeps a piece; refuses it if all pieces together have more than `limit` bytes."""
        self._bytes += len(content)
        if self._bytes > limit:
            raise MalformedMessage(f"bytes={self._bytes} or more: at most {limit} make an answer to this job")
        self.contents[piece] = content


def check_size(contents: dict[str, bytes], limit: int) -> None:
    """Refuses pieces that would take too much memory when put together, since an array may name one piece many times.

    Args:
      contents: piece by id.
      limit: most bytes of an answer.

    Raises:
      MalformedMessage: the pieces, counted by themselves and in their arrays, have more than twice `limit` bytes.
    """
    total = sum(map(len, contents.values()))
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            named = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            total += sum(len(contents[children[index]]) for index in named)
    if total > 2 * limit:  # each piece counts by itself and in its array
        raise MalformedMessage(f"bytes={total}: at most {2 * limit} make an answer to this job")


def why_lost(error: Exception) -> str:
    """Returns in a few words why a link was lost, from an exception of `LOST`."""
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in _ENDED:
        return "it ended our run; was this machine asleep for a minute"
    if isinstance(error, httpx.HTTPStatusError):
        return f"it answered {error.response.status_code}"
    return type(error).__name__


def retries() -> RetryInvoker:
    """Returns the policy by which a call is tried again.

    Flower's own retries never end, also when the SuperLink has died. On 401 they send this process an interrupt, which
    would look like a person's, and on 403 they raise what no `except Exception` catches. A SuperLink answers 401 and
    403 for a run that missed its heartbeats.
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
