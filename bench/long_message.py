"""A round's two long messages through the real programs: an adapter down and a masked vector up, of any length.

`python -m bench.long_message --millions 270` sends 270 million numbers, over 1 GiB, each way between a coordinator
behind Flower's SuperLink and one site behind a SuperNode, in signed letters, and prints JSON: seconds, and each
process's peak of memory over the vector's bytes. `--codec` writes and reads the messages in one process, without
Flower: for lengths beyond 2 GiB, where a protobuf message would end.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.depot import SITES, World, _free_port, _peak, build
from offsite.protos import codec, signed_messages
from offsite.protos.flower_pieces import OTHER_BYTES, VALUE_BYTES
from offsite.secagg.signed_bodies import Signed
from offsite.trust.identity import Identity

SITE, SECONDS, FEDERATION = SITES[0], 1200.0, bytes(32)
COORDINATOR, OWNER = Identity.from_bytes(bytes(32)), Identity.from_bytes(bytes([1]) * 32)


def question(length: int) -> bytes:
    """Returns the signed request of a training with an adapter of so many entries."""
    request = codec.TrainRequest(bytes(32), 1, np.arange(length, dtype=np.float32))
    return _letter(COORDINATOR, signed_messages.COORDINATOR, SITE, codec.encode(request))


def answer(data: bytes) -> bytes:
    """Returns a site's signed answer: a vector that follows from the adapter."""
    letter = signed_messages.read(
        data, FEDERATION, sender=signed_messages.COORDINATOR, key=COORDINATOR.public, recipient=SITE
    )
    request = codec.decode(letter.body)
    if not isinstance(request, codec.TrainRequest):
        raise RuntimeError(f"message={type(request).__name__}: a training was asked for")
    vector = request.adapter.view("<u4") + np.uint32(1)
    reply = codec.MaskedReply(Signed(SITE, hashlib.sha256(vector).digest(), b""), vector)
    del letter, request
    return _letter(OWNER, SITE, signed_messages.COORDINATOR, codec.encode(reply))


def is_right(data: bytes, length: int) -> bool:
    """Opens an answer, adds it as the collector does, and compares the sum."""
    letter = signed_messages.read(
        data, FEDERATION, sender=SITE, key=OWNER.public, recipient=signed_messages.COORDINATOR
    )
    reply = codec.decode(letter.body)
    total = np.zeros(length, dtype=np.uint32)
    if not isinstance(reply, codec.MaskedReply) or hashlib.sha256(reply.vector).digest() != reply.commitment.body:
        return False
    total += reply.vector
    return bool(
        total[1] == np.float32(1).view(np.uint32) + 1 and total[-1] == np.float32(length - 1).view(np.uint32) + 1
    )


def _letter(identity: Identity, sender: str, recipient: str, body: bytes) -> bytes:
    return signed_messages.write(
        identity, FEDERATION, sender=sender, recipient=recipient, stage="masked", number=1, body=body
    )


def site(folder: Path, port: int, largest: int) -> None:
    """Answers behind a SuperNode until a signal."""
    from offsite.client.network.node import Node, SuperNodeConfig

    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))

    def handle(stage: str, body: bytes) -> bytes:
        reply = answer(body)
        import psutil

        peaks = {"site": _peak(os.getpid()), "supernode": sum(_peak(c.pid) for c in psutil.Process().children())}
        (folder / "site.json").write_text(json.dumps(peaks))
        return reply

    config = SuperNodeConfig(
        folder / "node", f"127.0.0.1:{port}", folder / "ca.pem", folder / SITE / "node.key", _free_port()
    )
    Node(config, handle, largest=lambda: largest, note=lambda *_: None, stopping=lambda: bool(stop)).run()


def by_flower(world: World, length: int) -> dict[str, Any]:
    """Sends the question over a SuperLink and checks the answer."""
    from flwr.app import Message

    from offsite.coordinator.network.flower_exchange import call
    from offsite.coordinator.network.superlink_session import SuperLinkPlace, SuperLinkSession
    from offsite.protos.flower import pack
    from offsite.trust.keys import SiteKeys

    folder, port, largest = world.folder, _free_port(), VALUE_BYTES * length + OTHER_BYTES
    files = (folder / "ca.pem", folder / "server.pem", folder / "server.key")
    place = SuperLinkPlace(Path(tempfile.mkdtemp(dir=folder)), "127.0.0.1", port, *files)
    command = [sys.executable, "-m", "bench.long_message", "--site", str(folder), "--port", str(port)]
    keys = {SITE: SiteKeys.load(folder / SITE).node_public()}
    with SuperLinkSession(place, keys, largest=largest) as link:
        running = subprocess.Popen([*command, "--largest", str(largest)])
        try:
            while not (nodes := link.node_ids()):
                time.sleep(0.1)
            began = time.monotonic()
            message = Message(content=pack("masked", question(length)), dst_node_id=nodes[SITE], message_type="train")
            replies = call(link.grid, {SITE: message}, SECONDS)
            seconds = time.monotonic() - began
            del message
            right = SITE in replies and is_right(replies[SITE], length)
            peaks = json.loads((folder / "site.json").read_text()) if right else {}
            peaks |= {"coordinator": _peak(os.getpid()), "superlink": _peak(link.process.pid or 0)}
        finally:
            running.terminate()
            running.wait(60)
    return _result(length, seconds, right, peaks)


def by_codec(length: int) -> dict[str, Any]:
    """Writes and reads both messages in this process."""
    began = time.monotonic()
    right = is_right(answer(question(length)), length)
    return _result(length, time.monotonic() - began, right, {"process": _peak(os.getpid())})


def _result(length: int, seconds: float, right: bool, peaks: dict[str, float]) -> dict[str, Any]:
    size = VALUE_BYTES * length / 2**20
    return {
        "entries": length,
        "vector_mb": round(size),
        "right": right,
        "seconds": round(seconds, 1),
        "peak_mb": {name: round(peak) for name, peak in peaks.items()},
        "peak_over_vector": {name: round(peak / size, 2) for name, peak in peaks.items()},
    }


def main() -> int:
    """Measures and prints JSON, or runs as the site."""
    parser = argparse.ArgumentParser(description="messages of over 1 GiB through the real programs")
    parser.add_argument("--millions", type=float, default=270.0)
    parser.add_argument("--codec", action="store_true")
    for hidden, kind in (("--site", Path), ("--port", int), ("--largest", int)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    length = int(arguments.millions * 1e6)
    if arguments.site is not None:
        site(arguments.site, arguments.port, arguments.largest)
        return 0
    if arguments.codec:
        result = by_codec(length)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = by_flower(build(Path(folder), 1), length)
    print(json.dumps(result, indent=1))
    return 0 if result["right"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
