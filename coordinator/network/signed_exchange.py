"""An exchange of signed messages: the coordinator signs each question, and the answering site signs each answer."""

from collections.abc import Callable, Mapping

from offsite.coordinator.rounds.counter import MonotonicCounter
from offsite.coordinator.rounds.exchange import Exchange, cut
from offsite.errors import OffsiteError, ProtocolViolation
from offsite.protos import signed_messages
from offsite.trust.federation_manifest import FederationManifest
from offsite.trust.identity import Identity


class SignedExchange:
    """Sends each stage as signed messages over another exchange, and opens the answers.

    Args:
      exchange: exchange that carries the signed messages.
      identity: the coordinator's identity.
      federation: manifest with the sites' keys.
      counter: source of message numbers.
      on_bad: called with (site, reason) for an answer that the site did not sign as the answer to this message; the
        site then counts as silent.
      tries: number of times that a connected but silent site is asked. A message of Flower's can be lost when one of
        its programs is started again, and a site gives the same answer twice.
    """

    def __init__(
        self,
        exchange: Exchange,
        identity: Identity,
        federation: FederationManifest,
        counter: MonotonicCounter,
        on_bad: Callable[[str, str], None],
        *,
        tries: int = 1,
    ) -> None:
        self._exchange, self._identity, self._counter, self._on_bad = exchange, identity, counter, on_bad
        self._tries = tries
        self._digest = federation.digest()
        self._keys = {member.site: bytes.fromhex(member.identity) for member in federation.members}

    def send(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        """Returns the answers that sites signed, by site."""
        bodies: dict[str, bytes] = {}
        for _ in range(self._tries):
            if missing := {site: body for site, body in payloads.items() if site not in bodies}:
                bodies |= self._ask(stage, missing)
        return bodies

    def _ask(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        number = self._counter.next()
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
        answers = self._exchange.send(stage, outgoing)
        for site in sorted(answers):  # each is let go once it is open, since each may be as long as the adapter
            try:
                bodies[site] = self._open(site, stage, number, answers.pop(site))
            except OffsiteError as error:
                self._on_bad(site, cut(str(error)))
        return bodies

    def _open(self, site: str, stage: str, number: int, data: bytes) -> bytes:
        message = signed_messages.read(
            data, self._digest, sender=site, key=self._keys[site], recipient=signed_messages.COORDINATOR
        )
        if (message.stage, message.number) != (stage, number):
            raise ProtocolViolation(
                f"letter stage={message.stage!r} number={message.number}: the answer to {stage!r} {number} was expected"
                "; it is an answer to an earlier letter; drop it"
            )
        return message.body
