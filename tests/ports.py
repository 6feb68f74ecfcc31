"""Free ports for programs that listen later: each test process takes them from a range of its own."""

import os
import random
import re
import socket
from collections.abc import Iterator
from functools import cache

FIRST, COUNT, RANGES = 20_000, 1_000, 12  # below those that the system gives to connections by itself


@cache
def _candidates() -> Iterator[int]:
    """Yields the ports of this test process's range one after the other, from a random one on, so none twice soon."""

    def ports() -> Iterator[int]:
        worker = re.fullmatch(r"gw(\d+)", os.environ.get("PYTEST_XDIST_WORKER", ""))
        first = FIRST + COUNT * ((int(worker[1]) if worker else RANGES - 1) % RANGES)
        at = random.SystemRandom().randrange(COUNT)
        while True:
            yield first + at
            at = (at + 1) % COUNT

    return ports()


def free_ports(count: int) -> list[int]:
    """Returns ports on loopback at which nobody listens, and that no other test process takes."""
    found: list[int] = []
    while len(found) < count:
        port = next(_candidates())
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    return found


def has_ipv6() -> bool:
    """Says whether this machine has a loopback address of IPv6; some containers have none."""
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True
