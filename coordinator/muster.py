"""Who is ready: a job is offered to every site until enough have accepted, fetched and loaded it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from coordinator.exchange import Conversation, Exchange
from coordinator.ledgers import Ledgers
from coordinator.status import Status
from errors import OffsiteError, TooFewSurvivors
from protos import codec
from trust.federation import Federation, check_signature

POLL_SECONDS = 0.5
READY = "ready"


@dataclass(frozen=True)
class Terms:
    """When to go on.

    Attributes:
      wanted: sites that should be ready before the first round.
      fewest: sites without which no round can be.
      patience: seconds without any progress after which to stop waiting.
    """

    wanted: int
    fewest: int
    patience: float


class Muster:
    """Offers one job and keeps the sites' signatures and ledger heads.

    Args:
      exchange: to the sites.
      federation: whose members are asked.
      offer_for: gives the offer to a site, from the signatures of the owners that are known.
      signatures: of the owners, by site; completed here.
      ledgers: what was countersigned of the sites' ledgers.
      status: told who is where.
      keep: called with (site, signature) when a new signature came.
      unopened: why an answer could not be opened, by site; read and emptied here.
    """

    def __init__(
        self,
        exchange: Exchange,
        federation: Federation,
        offer_for: Callable[[str, Mapping[str, bytes]], codec.Offer],
        *,
        signatures: dict[str, bytes],
        ledgers: Ledgers,
        status: Status,
        keep: Callable[[str, bytes], None],
        unopened: dict[str, str],
    ) -> None:
        self._exchange, self._federation, self._offer_for = exchange, federation, offer_for
        self._signatures, self._ledgers, self._status, self._keep = signatures, ledgers, status, keep
        self._unopened = unopened
        self._before: dict[str, tuple[str, int]] = {}

    def gather(self, terms: Terms) -> tuple[str, ...]:
        """Returns the ready sites once enough are, waiting as long as there is progress.

        Raises:
          TooFewSurvivors: nothing moved for the patience, and fewer are ready than a round needs.
        """
        moved = time.monotonic()
        while True:
            ready, progress = self._look()
            if len(ready) >= terms.wanted:
                return ready
            moved = time.monotonic() if progress else moved
            if time.monotonic() - moved > terms.patience:
                if len(ready) >= terms.fewest:
                    return ready
                raise TooFewSurvivors(
                    f"sites={len(ready)} ready, {terms.fewest} are needed: {self._status.reasons()}; nothing moved for "
                    f"{terms.patience:g} s; start the missing clients and run again"
                )
            time.sleep(POLL_SECONDS)

    def cohort(self) -> tuple[str, ...]:
        """Returns who is ready now; asked before each round, so that a site that came back is in."""
        return self._look()[0]

    def _look(self) -> tuple[tuple[str, ...], bool]:
        """Offers the job once, and returns who is ready and whether anything changed."""
        sites = [member.site for member in self._federation.members]
        talk = Conversation(self._exchange)
        offers = {site: self._offer_for(site, self._signatures) for site in sites}
        answers = talk.ask("offer", offers, codec.OfferReply)
        states = {refused.site: ("refused", 0, refused.reason) for refused in talk.refused}
        for site, reply in answers.items():
            states[site] = (reply.state, reply.fetched, reply.detail)
            self._learn(site, reply)
        for site, (state, fetched, detail) in states.items():
            if why := self._unopened.pop(site, ""):
                states[site] = (state, fetched, why)
            elif detail == "did not answer":
                states[site] = ("absent", fetched, detail)
            self._status.site(site, states[site][0], states[site][2], fetched)
        now = {site: (state, fetched) for site, (state, fetched, _) in states.items()}
        progress, self._before = now != self._before, now
        return tuple(sorted(site for site, (state, _, _) in states.items() if state == READY)), progress

    def _learn(self, site: str, reply: codec.OfferReply) -> None:
        if site not in self._signatures:
            try:
                check_signature(self._federation, site, reply.owner_signature)
            except OffsiteError as error:
                self._status.site(site, "refused", str(error), 0)
                return
            self._signatures[site] = reply.owner_signature
            self._keep(site, reply.owner_signature)
        self._ledgers.learn(site, reply.ledger)
