"""A site that cheats: `python -m tests.faults.hostile_site FOLDER`, with its current act in FOLDER/hostile.txt.

This program is `offsite client run` with its honest code changed in the places named here, as a hostile owner could.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from offsite.client.network.message_endpoint import SignedEndpoint
from offsite.client.site import round_handler as site_module
from offsite.protos import codec
from offsite.protos import round_pb2 as wire
from offsite.secagg import member as member_module
from offsite.secagg import ring, signed_bodies
from offsite.secagg.member import Member
from tests.faults.poison import poison

FOLDER = Path(sys.argv[1])
WEIGHT = 1e9


def mode() -> str:
    path = FOLDER / "hostile.txt"
    return path.read_text() if path.exists() else ""


def wrap(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replaces a function by a wrapper with the original as its first argument."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **named: change(original, *arguments, **named))


LAST: dict[str, bytes] = {}


def answer(original: Any, endpoint: Any, stage: str, data: bytes) -> bytes:
    """The letter on its way out."""
    reply: bytes = original(endpoint, stage, data)
    earlier = LAST.get("letter", b"")
    LAST["letter"] = reply
    changes: dict[tuple[str, str], Callable[[], bytes]] = {
        ("train", "weight"): lambda: weighed(endpoint, reply),
        ("masked", "truncated"): lambda: reply[:-100],
        ("masked", "flipped"): lambda: reply[:200] + bytes([reply[200] ^ 1]) + reply[201:],
        ("masked", "replayed"): lambda: earlier,
        ("masked", "as birch"): lambda: signed_as(endpoint, "birch", reply),
    }
    return changes.get((stage, mode()), lambda: reply)()


def signed_as(endpoint: Any, sender: str, reply: bytes, body: bytes | None = None) -> bytes:
    from offsite.protos import signed_messages

    letter = codec.decode_signed_message(reply)
    return signed_messages.write(
        endpoint._identity,
        letter.federation,
        sender=sender,
        recipient=letter.recipient,
        stage=letter.stage,
        number=letter.number,
        body=letter.body if body is None else body,
    )


def weighed(endpoint: Any, reply: bytes) -> bytes:
    """Adds a field that says how many records stand behind the update; there is none in the protocol."""
    body = codec.decode_signed_message(reply).body
    end = 4 + int.from_bytes(body[:4], "big")
    envelope = wire.Envelope()
    envelope.ParseFromString(body[4:end])
    head = envelope.SerializeToString() + bytes([15 << 3 | 1]) + np.float64(WEIGHT).tobytes()
    body = len(head).to_bytes(4, "big") + head + body[end:]
    return signed_as(endpoint, endpoint._site, reply, body)


def local_update(original: Any, *arguments: Any, **named: Any) -> Any:
    """The update before secure aggregation."""
    trained = original(*arguments, **named)
    update = trained.update.copy()
    if mode() == "nan":
        update[1] = np.nan
    elif mode() == "huge":
        update[1] = 1e30
    elif mode() == "heavy":
        update = np.sign(update) * np.float32(WEIGHT)
    return dataclasses.replace(trained, update=update)


OPENLY: dict[str, Callable[[Any, float], Any]] = {
    "openly nan": lambda update, bound: np.where(np.arange(update.size) == 1, np.float32(np.nan), update),
    "poisoned": lambda update, bound: poison(update.size, bound),
}


def spend(original: Any, update: Any, terms: Any, *rest: Any, **named: Any) -> Any:
    """Another update in the place of the trained and entered update, with the site's own check left out."""
    if mode() not in OPENLY:
        return original(update, terms, *rest, **named)
    check, ring.check = ring.check, lambda *_, **__: None  # type: ignore[assignment]
    try:
        return original(OPENLY[mode()](update, terms.clip), terms, *rest, **named)
    finally:
        ring.check = check


def encode(original: Any, update: Any, **named: Any) -> Any:
    """Encodes without the site's own check: the ring holds no more than the largest value for each entry."""
    if mode() != "heavy":
        return original(update, **named)
    top = ring.levels(named["members"])
    return np.where(update > 0, top, -top).astype(np.int32).view(np.uint32)


def masked(original: Any, site: Any, batch: Any) -> Any:
    reply = original(site, batch)
    if mode() == "other vector":
        vector = reply.vector.copy()
        vector[0] += 1
        return dataclasses.replace(reply, vector=vector)
    return reply


def unmask(original: Any, member: Any, signatures: Any) -> Any:
    message = original(member, signatures)
    if mode() != "bad share":
        return message
    released = signed_bodies.read_released(message.body)
    wrong = {peer: (kind, share + 1) for peer, (kind, share) in released.items()}
    return member._sign(signed_bodies.UNMASK, signed_bodies.write_released(wrong))


def main() -> None:
    """Runs the client with these changes."""
    wrap(SignedEndpoint, "answer", answer)
    wrap(site_module, "local_update", local_update)
    wrap(site_module, "spend", spend)
    wrap(member_module.ring, "encode", encode)
    wrap(site_module.Site, "masked", masked)
    wrap(Member, "unmask", unmask)
    site_module.STAGES["masked"] = lambda site, message: site.masked(message)
    sys.argv = ["offsite", "client", "run", str(FOLDER)]
    from offsite.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
