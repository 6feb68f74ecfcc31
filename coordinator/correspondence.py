"""An exchange by signed letters: what leaves is signed by the coordinator, what comes back by the site it is from."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from coordinator.exchange import Exchange
from coordinator.store import write_atomically
from errors import OffsiteError, ProtocolViolation
from protos import letters
from trust.federation import Federation
from trust.identity import Identity


class Numbers:
    """Letter numbers that only go up, over restarts too.

    They start at the clock and are kept in a file, so that neither a clock that was set back nor a lost file makes a
    number come again unless both happen at once; a site then refuses until the clock has caught up.
    """

    def __init__(self, path: Path, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._path, self._clock_ns = path, clock_ns

    def next(self) -> int:
        """Returns the next number, durably."""
        last = int(self._path.read_text(encoding="ascii")) if self._path.exists() else 0
        number = max(last + 1, self._clock_ns())
        write_atomically(self._path, str(number).encode("ascii"))
        return number


class Correspondence:
    """Sends each stage as signed letters over another exchange, and opens the answers.

    Args:
      exchange: carries the letters.
      identity: the coordinator's.
      federation: gives the sites' keys.
      numbers: of the letters.
      on_bad: told site and reason when an answer is not what the site signed for this letter; it then did not answer.
    """

    def __init__(
        self,
        exchange: Exchange,
        identity: Identity,
        federation: Federation,
        numbers: Numbers,
        on_bad: Callable[[str, str], None],
    ) -> None:
        self._exchange, self._identity, self._numbers, self._on_bad = exchange, identity, numbers, on_bad
        self._digest = federation.digest()
        self._keys = {member.site: bytes.fromhex(member.identity) for member in federation.members}

    def send(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        """Returns what the sites answered and signed, by site."""
        number = self._numbers.next()
        outgoing = {
            site: letters.write(
                self._identity,
                self._digest,
                sender=letters.COORDINATOR,
                recipient=site,
                stage=stage,
                number=number,
                body=body,
            )
            for site, body in payloads.items()
        }
        bodies = {}
        for site, data in self._exchange.send(stage, outgoing).items():
            try:
                bodies[site] = self._open(site, stage, number, data)
            except OffsiteError as error:
                self._on_bad(site, str(error))
        return bodies

    def _open(self, site: str, stage: str, number: int, data: bytes) -> bytes:
        letter = letters.read(data, self._digest, sender=site, key=self._keys[site], recipient=letters.COORDINATOR)
        if (letter.stage, letter.number) != (stage, number):
            raise ProtocolViolation(
                f"letter stage={letter.stage!r} number={letter.number}: the answer to {stage!r} {number} was expected; "
                "it is an answer to an earlier letter; drop it"
            )
        return letter.body
