"""Flower's grid for our needs: our secret on each request, retries that end, and bad answers that cost only their site.

Written against flwr 1.41; a newer Flower has to pass `tests/coordinator/test_grid.py` and `test_link.py`.
"""

import logging
from collections.abc import Iterable
from typing import Any

import httpx
from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import MAX_RETRY_DELAY, ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, ObjectUnavailableError
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.superlink.grid.http_grid import HttpGrid

from offsite.errors import MalformedMessage
from offsite.protos.flower_http import RuntimeClient
from offsite.protos.flower_pieces import Incoming
from offsite.protos.guard import Secret

log = logging.getLogger("offsite.coordinator")
LOST_SECONDS = 20.0
LOST = (httpx.TransportError, httpx.HTTPStatusError)  # exceptions after which a link has to be started again
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

    def __init__(self, address: str, ca: bytes, *, token: str, secret: str, largest: int) -> None:
        super().__init__(address, root_certificates=ca, token=token)
        self._secret, self._largest = secret, largest
        self._incoming: dict[str, Incoming] = {}
        self._retry_invoker = retries()

    def _connect(self) -> None:
        self._client = RuntimeClient.from_server_address(
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
            self._incoming[head.metadata.reply_to_message_id] = Incoming(head.metadata.message_id, tree, self._largest)
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

    def _inflated(self, incoming: Incoming) -> Message:
        """Returns a complete answer.

        Raises:
          ObjectUnavailableError: a piece has not arrived yet.
          MalformedMessage: the answer is too large or no message.
        """
        incoming.collect(make_pull_object_fn_protobuf(self._runtime_client.PullObject, self.node, self._run_id))
        self._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=self._run_id, message_object_id=incoming.name)
        )
        return incoming.message()

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
