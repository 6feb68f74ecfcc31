"""Everything that we use of Flower's private interface at a site: take a message, answer it with installed code, push.

Flower would start a process for every message and run the code that came with it. This loop stays warm, runs what is
installed here, and answers a bundle it does not know with an error. Written against flwr 1.41.
"""

import hashlib
import hmac
import logging
from collections.abc import Callable
from typing import Any

import httpx
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from errors import MalformedMessage
from protos.flower import bundle, pack, unpack
from protos.guard import HEADER

log = logging.getLogger("offsite.client")
Handler = Callable[[str, bytes], bytes]
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


class _Secret:
    def __init__(self, secret: str) -> None:
        self._secret = secret

    def intercept(self, context: Any, call_next: Any) -> Any:
        context.request.headers[HEADER] = self._secret
        return call_next(context)


class Executor:
    """Takes tasks of the SuperNode on this machine.

    Args:
      address: of the SuperNode's runtime interface, on loopback.
      guard: secret of our guard.
      secret: with which tasks are acquired.
      handle: (stage, bytes) -> bytes, this site's answer.
      on_foreign: told the SHA-256 of a bundle that is not ours.
    """

    def __init__(
        self, address: str, *, guard: str, secret: bytes, handle: Handler, on_foreign: Callable[[str], None]
    ) -> None:
        self._address, self._guard = address, guard
        self._handle, self._on_foreign = handle, on_foreign
        self._auth = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=[_ACQUIRE])
        self._acquirer = self._client([self._auth])

    def close(self) -> None:
        """Closes the connection to the SuperNode."""
        self._acquirer.close()

    def step(self) -> bool:
        """Answers one message if there is one, and says whether there was.

        Raises:
          httpx.HTTPError: the SuperNode is not there.
        """
        answer = self._acquirer.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
        if not (answer.HasField("task") and answer.token):
            return False
        client = self._client([RuntimeTokenHttpInterceptor(answer.token)])
        heartbeat = HeartbeatSender(_beat(client))
        heartbeat.start()
        try:
            self._run(client)
        finally:
            heartbeat.stop()
            client.close()
        return True

    def _run(self, client: RuntimeHttpClient) -> None:
        message, context, _, fab = pull_task_input(client)
        expected = bundle()[1]
        found = hashlib.sha256(fab.content).hexdigest()
        if not hmac.compare_digest(found, expected):
            self._on_foreign(found)
            reason = "bundle is not the one without code; this site runs only what is installed here"
            reply = Message(Error(code=ErrorCode.INVALID_FAB, reason=reason), reply_to=message)
        else:
            reply = self._answer(message)
        push_message(client, reply, context)
        push_task_output(client, context, "completed", "")

    def _answer(self, message: Message) -> Message:
        try:
            stage, body = unpack(message.content)
        except (KeyError, ValueError, TypeError, MalformedMessage):
            error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason="message is not a stage of offsite")
            return Message(error, reply_to=message)
        return Message(content=pack(stage, self._handle(stage, body)), reply_to=message)

    def _client(self, interceptors: list[Any]) -> RuntimeHttpClient:
        return RuntimeHttpClient(
            f"http://{self._address}",
            interceptors=[
                _Secret(self._guard),
                RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
                *interceptors,
            ],
        )


def _beat(client: RuntimeHttpClient) -> Callable[[], bool]:
    """Returns a heartbeat; Flower's own interrupts the whole process when a task is not known any more."""

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True

    return beat
