"""The program of a worker: a further process of a site, which computes its share of each training step.

A worker holds no key, opens no connection and writes no file. It ends when the process that started it ends, in
whatever way: it waits for the end of the one pair of sockets that it has. The system's own signal for this would follow
the end of the thread that started the worker.
"""

import logging
import os
import select
import signal
import sys
import threading
from multiprocessing.connection import Connection

from offsite.protos.flower_process import forbid_core_dumps

EXIT_ALONE = 75


def main() -> None:
    """Serves the process that has started this one, on the socket whose number is the only argument."""
    connection = Connection(int(sys.argv[1]))
    threading.Thread(target=_end_with_parent, args=(connection.fileno(),), name="watch", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the other process decides when to end
    forbid_core_dumps()
    logging.basicConfig(level=logging.WARNING, format=f"worker {os.getpid()}: %(message)s")
    from offsite.client.training.worker_training import serve  # loads torch for seconds, which the watch has to cover

    serve(connection)


def _end_with_parent(descriptor: int) -> None:
    """Ends this process when nobody holds the other end of the socket any more, also in the middle of a step."""
    poll = select.poll()
    poll.register(descriptor, 0)  # the end of the other side is reported always
    poll.poll()
    os._exit(EXIT_ALONE)


if __name__ == "__main__":
    main()
