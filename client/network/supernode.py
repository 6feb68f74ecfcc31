"""The SuperNode process: Flower's own program behind our guard; `python -m offsite.client.network.supernode ARGUMENTS`.

After one HTTP 500, Flower 1.41's SuperNode goes on as a process that does nothing. So this program ends with the
SuperNode's loop, and the site starts the program again.
"""

import os
import time
from types import SimpleNamespace
from typing import Any

from offsite.protos.flower_http import straight
from offsite.protos.flower_process import die_with_parent, forbid_core_dumps
from offsite.protos.guard import Guard, secret_of_environment
from offsite.protos.proxies import VARIABLE as PROXY

POLL_SECONDS = 0.3  # Flower waits three seconds between two looks for a message, and a round has six messages
HEARTBEAT_SECONDS = 10  # a silent node counts as gone after twice this time, and is refused until then
RETRY_SECONDS = 4  # longest pause between two tries to reach the coordinator again
# The same for a heartbeat; with Flower's 20 seconds a working site that came back would count as gone.
HEARTBEAT_RETRY_SECONDS = 2
EXIT_ENDED = 75


def main() -> None:
    """Runs Flower's SuperNode and ends the process with it."""
    die_with_parent()
    forbid_core_dumps()
    import flwr.supernode.fleet_http_connection as connection
    import flwr.supernode.main as program
    import flwr.supernode.start_client_internal as loop
    from flwr.supercore import heartbeat
    from flwr.supercore.retry import http_retry
    from flwr.supernode.cli.flower_supernode import flower_supernode

    original, secret = program.create_app, secret_of_environment()

    def create_app(*arguments: Any, **named: Any) -> Any:
        app = original(*arguments, **named)
        app.add_middleware(Guard, secret=secret, public=())
        return app

    program.create_app = create_app
    connection.FleetHttpClient = straight(connection.FleetHttpClient, os.environ.pop(PROXY, ""))
    loop.time = SimpleNamespace(sleep=lambda _: time.sleep(POLL_SECONDS), time=time.time, monotonic=time.monotonic)
    for module in (heartbeat, connection):
        if hasattr(module, "HEARTBEAT_DEFAULT_INTERVAL"):
            module.HEARTBEAT_DEFAULT_INTERVAL = HEARTBEAT_SECONDS
    http_retry.MAX_RETRY_DELAY = RETRY_SECONDS
    exponential = heartbeat.exponential
    heartbeat.exponential = lambda max_delay: exponential(max_delay=min(max_delay, HEARTBEAT_RETRY_SECONDS))
    try:
        flower_supernode()
    finally:
        os._exit(EXIT_ENDED)


if __name__ == "__main__":
    main()
