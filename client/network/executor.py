"""All use of Flower's private interface at a site: take a message, answer with the installed code, push the answer.

Flower would start a process for every message and run the code that came with the message. This loop stays warm, runs
the installed code only, and answers an unknown bundle with an error. Written against flwr 1.41.
"""

import hashlib
import hmac
import logging
from collections.abc import Callable
from typing import Any

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from flwr.common.serde import context_from_proto, fab_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from offsite.errors import MalformedMessage
from offsite.protos.flower import bundle, pack, unpack
from offsite.protos.guard import Secret

log = logging.getLogger("offsite.client")
Handler = Callable[[str, bytes], bytes]
PULL_SECONDS = 3.0
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


class Executor:
    """Takes tasks of the SuperNode on this machine.

    Args:
      address: host:port of the SuperNode's runtime interface, on loopback.
      guard: secret of offsite's guard before that interface.
      secret: secret with which Flower lets an executor acquire tasks.
      handle: function from stage and bytes to this site's answer, bytes.
      on_foreign: function that gets the SHA-256 of an unknown bundle.
      stopping: function that says whether to end.
    """

    def __init__(
        self,
        address: str,
        *,
        guard: str,
        secret: bytes,
        handle: Handler,
        on_foreign: Callable[[str], None],
        stopping: Callable[[], bool],
    ) -> None:
        self._address, self._guard = address, guard
        self._handle, self._on_foreign, self._stopping = handle, on_foreign, stopping
        self._auth = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=[_ACQUIRE])
        self._acquirer = self._client([self._auth])
        self._waiting: Any = None  # task acquired while the message of another task was awaited

    def close(self) -> None:
        """Closes the connection to the SuperNode."""
        self._acquirer.close()

    def step(self) -> bool:
        """Answers a waiting message, and says whether a message was waiting.

        Raises:
          httpx.HTTPError: the SuperNode does not answer.
        """
        answer, self._waiting = self._waiting or self._acquire(), None
        if answer is None:
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

    def _acquire(self) -> Any:
        answer = self._acquirer.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
        return answer if answer.HasField("task") and answer.token else None

    def _run(self, client: RuntimeHttpClient) -> None:
        pulled = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = pulled.task_id, pulled.run.run_id
        TaskIdentity.node_id = pulled.context.node_id
        context, fab = context_from_proto(pulled.context), fab_from_proto(pulled.fab)
        message = self._pull(client, context)
        if message is None:
            push_task_output(client, context, "failed", "its message never came")
            return
        digest = hashlib.sha256(fab.content).hexdigest()
        if not hmac.compare_digest(digest, bundle()[1]):
            self._on_foreign(digest)
            reason = "bundle is not the one without code; this site runs only what is installed here"
            reply = Message(Error(code=ErrorCode.INVALID_FAB, reason=reason), reply_to=message)
        else:
            reply = self._answer(message)
        push_message(client, reply, context)
        push_task_output(client, context, "completed", "")

    def _pull(self, client: RuntimeHttpClient, context: Context) -> Message | None:
        """Returns the message of a task once the message is whole, however slow the link; None where it never will be.

        Flower makes the task before it fetches the message. When the run ends meanwhile, Flower forgets the message but
        not the task. A SuperNode handles one message at a time, so a second task proves that the first is dead.
        """
        answer = client.PullMessages(PullAppMessagesRequest())
        if not answer.messages_list:
            return None
        tree, node = answer.message_object_trees[0], Node(node_id=context.node_id)
        while True:
            try:
                message = pull_and_inflate_object_from_tree(
                    tree,
                    make_pull_object_fn_protobuf(client.PullObject, node, context.run_id),
                    make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, context.run_id),
                    return_type=Message,
                    max_time=PULL_SECONDS,
                    initial_backoff=PULL_SECONDS / 10,
                    backoff_cap=PULL_SECONDS / 2,
                )
            except ObjectPullError:
                self._waiting = self._acquire()
                if self._waiting is not None or self._stopping():
                    return None
                continue
            message.metadata.__dict__["_message_id"] = tree.object_id
            return message

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
                Secret(self._guard),
                RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
                *interceptors,
            ],
        )


def _beat(client: RuntimeHttpClient) -> Callable[[], bool]:
    """Returns a heartbeat; Flower's own heartbeat interrupts the whole process when the SuperNode forgot the task."""

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True

    return beat
