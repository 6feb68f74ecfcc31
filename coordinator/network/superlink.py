"""The SuperLink process: Flower's own program behind our guard; `python -m offsite.coordinator.network.superlink`."""

import asyncio
import os
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from offsite.coordinator.network.admission import Admission, Connection, ConnectionLimits
from offsite.coordinator.network.front_door import BACKLOG, open_doors
from offsite.protos.flower_pieces import SPARE_PIECES, pieces_of
from offsite.protos.flower_process import allow_open_files, die_with_parent, forbid_core_dumps
from offsite.protos.guard import (
    LISTED_BYTES,
    MAX_BODY_BYTES,
    MAX_HELD_BYTES,
    MAX_OBJECT_BYTES,
    Guard,
    Peer,
    RequestLimits,
    secret_of_environment,
)

UPLOAD_IDLE_SECONDS = 60  # an upload that moved no piece for so long is dead; until then the others wait for it
# Paths that a SuperNode needs; all others on this port start runs, hand out tasks or describe the interface.
PUBLIC = ("/v1/fleet/", "/health")
# A stranger has so long until its first request has a head, TLS included, and until a request has shown who it is; a
# piece of an upload, which does both in one, may take `protos.guard.READ_SECONDS`.
HEAD_SECONDS, STRANGER_SECONDS = 15, 120
LARGEST = "OFFSITE_LARGEST_MESSAGE"  # bytes of the longest answer that an honest site of the job gives


def limits_for(largest: int) -> RequestLimits:
    """Returns what peers may send in a job whose longest message has so many bytes.

    The longest request without content lists the pieces of a message. Flower writes each name into its database under
    one lock, so that a list is no longer than the job's own messages need.
    """
    listed = max(MAX_BODY_BYTES, LISTED_BYTES * (pieces_of(largest) + SPARE_PIECES))
    return RequestLimits(
        longer={"/v1/fleet/push-object": MAX_OBJECT_BYTES, "/v1/fleet/push-messages": listed},
        held=max(MAX_HELD_BYTES, 2 * listed),
    )


class Crowd:
    """The connections of the SuperLink, and the time that a stranger has.

    Args:
      admission: open connections of the SuperLink.
    """

    def __init__(self, admission: Admission) -> None:
        self.admission = admission

    def note(self, peer: Peer, known: bool) -> None:
        """Takes from the guard that a peer has begun a request, or has shown who it is."""
        connection = self.admission.of(peer)
        if connection is not None:
            connection.asked = True
            if known:
                self.admission.know(connection)

    def watch(self, connection: Connection) -> None:
        """Gives a new connection its time."""
        loop = asyncio.get_running_loop()
        loop.call_later(HEAD_SECONDS, self._expel_silent, connection)
        loop.call_later(STRANGER_SECONDS, self._expel_stranger, connection)

    def _expel_silent(self, connection: Connection) -> None:
        if not connection.asked:
            self.admission.expel(connection)

    def _expel_stranger(self, connection: Connection) -> None:
        if not connection.known:
            self.admission.expel(connection)


def main() -> None:
    """Runs Flower's SuperLink; peers reach its fleet interface only."""
    die_with_parent()
    forbid_core_dumps()
    allow_open_files()
    import flwr.supercore.corestate.sql_corestate as state
    import flwr.superlink.main as program
    import uvicorn

    command: Any = import_module("flwr.superlink.cli.flower_superlink")  # a function of this name hides it
    original, secret = program.create_app, secret_of_environment()
    limits = limits_for(int(os.environ[LARGEST]))
    crowd = Crowd(Admission(ConnectionLimits.of_this_process(1)))

    def create_app(*arguments: Any, **named: Any) -> Any:
        app = original(*arguments, **named)
        app.add_middleware(Guard, secret=secret, public=PUBLIC, limits=limits, note=crowd.note)
        return app

    program.create_app = create_app
    state.OBJECT_PUSH_SESSION_TTL_SECONDS = UPLOAD_IDLE_SECONDS

    def serve(**named: Any) -> None:
        # The access log would list failed requests, in any number and with the path as a stranger wrote it. An address
        # is the connection's own, whatever a header says. Only asyncio's own loop accepts through our sockets.
        own = {"access_log": False, "proxy_headers": False, "loop": "asyncio", "backlog": BACKLOG}
        config = uvicorn.Config(**(named | own))
        doors = open_doors(config.host, config.port, crowd.admission, crowd.watch)
        uvicorn.Server(config).run(sockets=list(doors))

    command.uvicorn = SimpleNamespace(run=serve)
    command.flower_superlink()


if __name__ == "__main__":
    main()
