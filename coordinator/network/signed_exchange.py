"""An exchange by signed letters: what leaves is signed by the coordinator, what comes back by the site it is from."""

from collections.abc import Callable, Mapping

from offsite.coordinator.rounds.counter import MonotonicCounter
from offsite.coordinator.rounds.exchange import Exchange, cut
from offsite.errors import OffsiteError, ProtocolViolation
from offsite.protos import signed_messages
from offsite.trust.federation_manifest import FederationManifest
from offsite.trust.identity import Identity


class SignedExchange:
    """Sends each stage as signed letters over another exchange, and opens the answers.

    Args:
      exchange: carries the letters.
      identity: the coordinator's.
      federation: gives the sites' keys.
      numbers: of the letters.
      on_bad: told site and reason when an answer is not what the site signed for this letter; it then did not answer.
      tries: how often a site is asked that is connected and does not answer: a message of Flower's can be lost when one
        of its programs was started again, and a site gives the same answer twice.
    """

    def __init__(
        self,
        exchange: Exchange,
        identity: Identity,
        federation: FederationManifest,
        numbers: MonotonicCounter,
        on_bad: Callable[[str, str], None],
        *,
        tries: int = 1,
    ) -> None:
        self._exchange, self._identity, self._numbers, self._on_bad = exchange, identity, numbers, on_bad
        self._tries = tries
        self._digest = federation.digest()
        self._keys = {member.site: bytes.fromhex(member.identity) for member in federation.members}

    def send(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        """Returns what the sites answered and signed, by site."""
        bodies: dict[str, bytes] = {}
        for _ in range(self._tries):
            if missing := {site: body for site, body in payloads.items() if site not in bodies}:
                bodies |= self._ask(stage, missing)
        return bodies

    def _ask(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        number = self._numbers.next()
        outgoing = {
            site: signed_messages.write(
                self._identity,
                self._digest,
                sender=signed_messages.COORDINATOR,
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
                self._on_bad(site, cut(str(error)))
        return bodies

    def _open(self, site: str, stage: str, number: int, data: bytes) -> bytes:
        letter = signed_messages.read(
            data, self._digest, sender=site, key=self._keys[site], recipient=signed_messages.COORDINATOR
        )
        if (letter.stage, letter.number) != (stage, number):
            raise ProtocolViolation(
                f"letter stage={letter.stage!r} number={letter.number}: the answer to {stage!r} {number} was expected; "
                "it is an answer to an earlier letter; drop it"
            )
        return letter.body
