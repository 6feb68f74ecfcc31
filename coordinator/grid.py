"""Flower's grid as we need it: our secret on each request, tries that end, and answers that cost their site alone.

Written against flwr 1.41; `tests/coordinator/test_grid.py` and `test_link.py` are what a newer Flower has to pass.
"""

import json
from collections.abc import Iterable
from itertools import islice
from typing import Any

import httpx
from flwr.app import Array, Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import MAX_RETRY_DELAY, ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.message_pb2 import Message as Announced
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid.http_grid import HttpGrid

from errors import MalformedMessage
from protos.codec import MAX_BYTES
from protos.guard import HEADER

LOST_SECONDS = 20.0
LOST = (httpx.TransportError, httpx.HTTPStatusError)  # what a link raises that has to be started again
PIECE, SPARE_PIECES = 1 << 20, 16  # Flower moves an answer in pieces of 1 to 5 MiB, and a few small ones around them
_PASSING = (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT)
_ENDED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


class Secret:
    """Adds this machine's secret to a request, so that our guard lets it through."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def intercept(self, context: Any, call_next: Any) -> Any:
        """Passes a request on, with the secret."""
        context.request.headers[HEADER] = self._secret
        return call_next(context)


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

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Returns the answers that are here, one that is too large or no message as an error of its site's.

        Flower's own raises for all answers of a poll what is wrong with one of them, and has then delivered them.

        Raises:
          httpx.HTTPError: the SuperLink is gone, or has ended the run.
        """
        found = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
        return [
            self._pulled(one, tree) for one, tree in zip(found.messages_list, found.message_object_trees, strict=True)
        ]

    def _pulled(self, announced: Announced, tree: ObjectTree) -> Message:
        question = announced.metadata.reply_to_message_id
        try:
            message = self._inflated(announced.metadata.message_id, tree)
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

    def _inflated(self, name: str, tree: ObjectTree) -> Message:
        most = self._largest // PIECE + SPARE_PIECES
        pieces = [one.object_id for one in islice(iterate_object_tree(tree), most + 1)]
        if len(pieces) > most:
            raise MalformedMessage(f"pieces={len(pieces)}: at most {most} make an answer to this job")
        pull = make_pull_object_fn_protobuf(self._runtime_client.PullObject, self.node, self._run_id)
        contents = pull_objects(pieces, pull)
        check_size(contents, self._largest + SPARE_PIECES * PIECE)
        self._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=self._run_id, message_object_id=name)
        )
        message = inflate_object_from_contents(name, contents)
        if not isinstance(message, Message):
            raise MalformedMessage(f"object={type(message).__name__}: a message was announced")
        message.metadata.__dict__["_message_id"] = name
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
