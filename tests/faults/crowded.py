"""A coordinator with few open files: `python -m tests.faults.crowded HOME FILES` opens its ports, and asks `ash`.

Each line on standard input is a question; its answer, or `none`, is a line on standard output.
"""

import resource
import sys
from pathlib import Path

from offsite.coordinator.home.provision import CoordinatorHome
from offsite.coordinator.network.depot import Depot, Tls
from offsite.coordinator.network.flower_exchange import GridExchange
from offsite.coordinator.network.superlink_session import SuperLinkPlace, SuperLinkSession
from offsite.protos.flower_pieces import OTHER_BYTES


def main() -> None:
    files = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    home = CoordinatorHome.open(Path(sys.argv[1]))
    nodes = {member.site: member.node for member in home.federation().members}
    settings = home.settings
    place = SuperLinkPlace(home.link, settings.host, settings.link_port, home.ca, home.server, home.server_key)
    tls = Tls(home.ca.read_bytes(), home.server.read_bytes(), home.server_key.read_bytes())
    address = f"{settings.host}:{settings.depot_port}"
    depot = Depot(home.folder / "depot", address=address, tls=tls, allowed=lambda certificate: None)
    depot.start()
    with SuperLinkSession(place, nodes, largest=OTHER_BYTES) as link:
        _say("open")
        exchange = GridExchange(link.grid, nodes=link.node_ids, deadline=60.0)
        for line in sys.stdin:
            answers = exchange.send("offer", {"ash": line.strip().encode()})
            _say(answers.get("ash", b"none").decode())
    depot.stop()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
