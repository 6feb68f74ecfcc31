"""Who may hold a connection: strangers take turns, and never the room of peers who have shown who they are.

A connection costs a stranger nothing and a server an open file, of which it has few. So strangers have a limit for each
address and one in all. Where a limit is reached a newcomer is let in, and the oldest stranger of the address with the
most strangers goes, a silent one first: whoever holds many connections pushes out their own.
"""

import resource
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Network

from offsite.trust.addresses import address_of

RESERVED_FILES = 100  # of a program for itself: libraries, logs, databases, and connections on their way out
MAX_STRANGERS, MAX_KNOWN = 512, 4096  # TLS takes a quarter of a megabyte of memory for each connection
STRANGERS_SHARE = 2  # half of the room, and of the strangers' room at most half to an address
Peer = tuple[str, int]


@dataclass(frozen=True)
class ConnectionLimits:
    """Most connections at once.

    Attributes:
      strangers: number of connections whose peers have not shown who they are.
      per_address: number of these from one address.
      known: number of connections of known peers.
    """

    strangers: int
    per_address: int
    known: int

    @classmethod
    def of_this_process(cls, files: int) -> "ConnectionLimits":
        """Returns the limits for which this process may open enough files.

        Args:
          files: number of open files that one connection takes.
        """
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        room = MAX_STRANGERS + MAX_KNOWN
        if soft != resource.RLIM_INFINITY:
            room = min(room, max(soft - RESERVED_FILES, 0) // files)
        strangers = max(4, min(MAX_STRANGERS, room // STRANGERS_SHARE))
        return cls(strangers, max(2, strangers // STRANGERS_SHARE), max(4, room - strangers))


@dataclass(eq=False)
class Connection:
    """One connection.

    Attributes:
      peer: address and port of the other end.
      cut: function that ends the connection.
      asked: whether the peer has begun a request.
      known: whether the peer has shown who it is.
    """

    peer: Peer
    cut: Callable[[], None]
    asked: bool = False
    known: bool = False

    @property
    def place(self) -> str:
        """The address as it is counted: of IPv6 the first half, since a network's guest has all that differ beyond."""
        address = address_of(self.peer[0])
        if address is None or address.version == 4:
            return self.peer[0]
        return str(IPv6Network((int(address) >> 64 << 64, 64)))


class Admission:
    """The open connections of one listener, used by one thread.

    Args:
      limits: most connections at once.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self._by_peer: dict[Peer, Connection] = {}
        # by address, and for each address in the order of arrival
        self._strangers: dict[str, dict[Connection, None]] = {}
        self._known: dict[str, dict[Connection, None]] = {}

    def enter(self, connection: Connection) -> None:
        """Takes a stranger's new connection in, and cuts an older connection where a limit is passed."""
        address = connection.place
        self._by_peer[connection.peer] = connection
        self._strangers.setdefault(address, {})[connection] = None
        if len(self._strangers[address]) > self._limits.per_address:
            self._cut_oldest(self._strangers, address)
        self._keep_to(self._strangers, self._limits.strangers)

    def leave(self, connection: Connection) -> None:
        """Forgets a connection that has ended."""
        pool = self._known if connection.known else self._strangers
        held = pool.get(connection.place, {})
        if connection in held:
            del held[connection]
            if not held:
                del pool[connection.place]
        if self._by_peer.get(connection.peer) is connection:
            del self._by_peer[connection.peer]

    def know(self, connection: Connection) -> None:
        """Counts a connection among those of known peers from now on."""
        if connection.known or self._by_peer.get(connection.peer) is not connection:
            return
        self.leave(connection)
        connection.known = True
        self._by_peer[connection.peer] = connection
        self._known.setdefault(connection.place, {})[connection] = None
        self._keep_to(self._known, self._limits.known)

    def of(self, peer: Peer) -> Connection | None:
        """Returns the connection of a peer."""
        return self._by_peer.get(peer)

    def expel(self, connection: Connection) -> None:
        """Cuts a connection and forgets it."""
        self.leave(connection)
        connection.cut()

    def _keep_to(self, pool: dict[str, dict[Connection, None]], limit: int) -> None:
        while sum(map(len, pool.values())) > limit:
            self._cut_oldest(pool, max(pool, key=lambda address: len(pool[address])))

    def _cut_oldest(self, pool: dict[str, dict[Connection, None]], address: str) -> None:
        """Cuts the oldest connection of an address, before any that has begun a request the oldest that has not."""
        oldest = next(iter(pool[address]))
        self.expel(next((connection for connection in pool[address] if not connection.asked), oldest))
