"""All use of Flower's private interface at a site: take a message, answer with the installed code, push the answer.

Flower would start a process for every message and run the code that came with the message. This loop stays warm, runs
the installed code only, and answers an unknown bundle with an error. Written against flwr 1.41.
"""

import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from typing import Any

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from flwr.common.serde import context_from_proto, fab_from_proto, message_from_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from offsite.errors import MalformedMessage
from offsite.protos.flower import bundle, pack, unpack
from offsite.protos.flower_http import RuntimeClient
from offsite.protos.flower_pieces import Incoming
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
      largest: function that returns the bytes of the longest honest message now.
      on_refused: function that gets a kind and a reason: of a bundle with code, or of a message that is none.
      stopping: function that says whether to end.
    """

    def __init__(
        self,
        address: str,
        *,
        guard: str,
        secret: bytes,
        handle: Handler,
        largest: Callable[[], int],
        on_refused: Callable[[str, str], None],
        stopping: Callable[[], bool],
    ) -> None:
        self._address, self._guard = address, guard
        self._handle, self._largest, self._on_refused, self._stopping = handle, largest, on_refused, stopping
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

    def _run(self, client: Any) -> None:
        pulled = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = pulled.task_id, pulled.run.run_id
        TaskIdentity.node_id = pulled.context.node_id
        context, fab = context_from_proto(pulled.context), fab_from_proto(pulled.fab)
        answer = client.PullMessages(PullAppMessagesRequest())
        if not answer.messages_list or not (reply := self._reply(client, context, answer, fab)):
            push_task_output(client, context, "failed", "its message never came")
            return
        push_message(client, reply, context)
        push_task_output(client, context, "completed", "")

    def _reply(self, client: Any, context: Context, answer: Any, fab: Fab) -> Message | None:
        """Returns the reply to a task's message, None where the message never comes; what is refused is noted."""
        head, tree = message_from_proto(answer.messages_list[0]), answer.message_object_trees[0]
        head.metadata.__dict__["_message_id"] = tree.object_id
        digest = hashlib.sha256(fab.content).hexdigest()
        if not hmac.compare_digest(digest, bundle()[1]):
            self._on_refused("foreign bundle refused", f"sha256={digest}")
            reason = "bundle is not the one without code; this site runs only what is installed here"
            return Message(Error(code=ErrorCode.INVALID_FAB, reason=reason), reply_to=head)
        try:
            message = self._pull(client, context, tree)
            return None if message is None else self._answer(message)
        except MalformedMessage as error:
            self._on_refused("message refused", str(error))
            reason = "message is not a stage of offsite, or is longer than any of this job"
            return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=head)

    def _pull(self, client: Any, context: Context, tree: ObjectTree) -> Message | None:
        """Returns the message of a task once the message is whole, however slow the link; None where it never will be.

        Flower makes the task before it fetches the message. When the run ends meanwhile, Flower forgets the message but
        not the task. A SuperNode handles one message at a time, so a second task proves that the first is dead.

        Raises:
          MalformedMessage: the message is too long, or its pieces do not make a message.
        """
        node, incoming = Node(node_id=context.node_id), Incoming(tree.object_id, tree, self._largest())
        pull = make_pull_object_fn_protobuf(client.PullObject, node, context.run_id)
        look = time.monotonic() + PULL_SECONDS
        while True:
            try:
                incoming.collect(pull)
                break
            except (ObjectUnavailableError, ObjectPullError):
                if time.monotonic() < look:
                    time.sleep(PULL_SECONDS / 30)
                    continue
                look = time.monotonic() + PULL_SECONDS
                self._waiting = self._acquire()
                if self._waiting is not None or self._stopping():
                    return None
        make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, context.run_id)(tree.object_id)
        return _whole(incoming)

    def _answer(self, message: Message) -> Message:
        try:
            stage, body = unpack(message.content)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise MalformedMessage(f"it is no stage of offsite ({type(error).__name__})") from error
        return Message(content=pack(stage, self._handle(stage, body)), reply_to=message)

    def _client(self, interceptors: list[Any]) -> Any:
        return RuntimeClient(
            f"http://{self._address}",
            interceptors=[
                Secret(self._guard),
                RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
                *interceptors,
            ],
        )


def _whole(incoming: Incoming) -> Message:
    try:
        return incoming.message()
    except MalformedMessage:
        raise
    except Exception as error:  # a coordinator may have put together anything
        raise MalformedMessage(f"its pieces do not make a message ({type(error).__name__})") from error


def _beat(client: Any) -> Callable[[], bool]:
    """Returns a heartbeat; Flower's own heartbeat interrupts the whole process when the SuperNode forgot the task."""

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True

    return beat
