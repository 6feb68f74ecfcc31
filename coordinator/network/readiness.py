"""Who is ready: a job is offered to every site until enough have accepted, fetched and loaded it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from offsite.coordinator.home.ledger_heads import Ledgers
from offsite.coordinator.home.status import Status
from offsite.coordinator.rounds.exchange import Conversation, Exchange, cut
from offsite.errors import OffsiteError, TooFewSurvivors, Untrusted
from offsite.protos import codec
from offsite.trust.federation_manifest import FederationManifest, check_signature

POLL_SECONDS = 0.5
FETCHING, WAITING, READY, REFUSED, ABSENT = "fetching", "waiting", "ready", "refused", "absent"
TOLD = (FETCHING, WAITING, READY, REFUSED)  # what a site may say of itself
PIECE, PIECES = 1 << 20, 64  # bytes of the package that count as progress; a site could count single bytes for ever
SILENT = "did not answer"


@dataclass(frozen=True)
class ReadinessPolicy:
    """When to go on.

    Attributes:
      wanted: sites that should be ready before the first round.
      min_sites: sites without which no round can be.
      patience: seconds without any progress after which to stop waiting.
    """

    wanted: int
    min_sites: int
    patience: float


@dataclass(frozen=True)
class _Stand:
    """Where one site stands: one of the five states, why, and the bytes and pieces of the package that are there."""

    state: str
    detail: str
    fetched: int = 0
    pieces: int = 0


class _Course:
    """How far the sites have come in one wait; what goes back and forth, or up without end, does not count."""

    def __init__(self) -> None:
        self._states: set[tuple[str, str]] = set()
        self._pieces: dict[str, int] = {}

    def note(self, stands: Mapping[str, _Stand]) -> bool:
        """Returns whether a site was never before in its state, or has a further piece of the package."""
        moved = [self._note(site, stand) for site, stand in stands.items()]
        return any(moved)

    def _note(self, site: str, stand: _Stand) -> bool:
        known, further = (site, stand.state) in self._states, stand.pieces > self._pieces.get(site, 0)
        self._states.add((site, stand.state))
        self._pieces[site] = max(stand.pieces, self._pieces.get(site, 0))
        return further or not known


class ReadinessPoller:
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
      current: gives the epoch that holds now; the owners may sign another one while a job waits.
      clock: gives seconds that only go up.
      sleep: waits for so many seconds.
    """

    def __init__(
        self,
        exchange: Exchange,
        federation: FederationManifest,
        offer_for: Callable[[str, Mapping[str, bytes]], codec.Offer],
        *,
        signatures: dict[str, bytes],
        ledgers: Ledgers,
        status: Status,
        keep: Callable[[str, bytes], None],
        unopened: dict[str, str],
        current: Callable[[], FederationManifest],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._exchange, self._federation, self._offer_for = exchange, federation, offer_for
        self._signatures, self._ledgers, self._status, self._keep = signatures, ledgers, status, keep
        self._unopened, self._current = unopened, current
        self._clock, self._sleep = clock, sleep

    def wait(self, terms: ReadinessPolicy) -> tuple[str, ...]:
        """Returns the ready sites once enough are, waiting as long as there is progress.

        Raises:
          TooFewSurvivors: nothing moved for the patience, and fewer are ready than a round needs.
          Untrusted: sites are missing that have gone on to another epoch since the job was made.
        """
        course, moved = _Course(), self._clock()
        while True:
            stands = self._look()
            ready = tuple(sorted(site for site, stand in stands.items() if stand.state == READY))
            if len(ready) >= terms.wanted:
                return ready
            if course.note(stands):
                moved = self._clock()
            if self._clock() - moved > terms.patience:
                if len(ready) >= terms.min_sites:
                    return ready
                self._check_epoch()
                raise TooFewSurvivors(
                    f"sites={len(ready)} ready, {terms.min_sites} are needed: {self._status.reasons()}; nothing moved "
                    f"for {terms.patience:g} s; start the missing clients and run again"
                )
            self._sleep(POLL_SECONDS)

    def _look(self) -> dict[str, _Stand]:
        """Offers the job once, and returns where each site stands."""
        sites = [member.site for member in self._federation.members]
        talk = Conversation(self._exchange)
        offers = {site: self._offer_for(site, self._signatures) for site in sites}
        answers = talk.ask("offer", offers, codec.OfferReply)
        if any(site not in self._signatures for site in sites):  # with all of them, the job runs on under its epoch
            self._check_epoch()
        stands = {one.site: self._without(one.site, one.reason) for one in talk.refused}
        stands |= {site: self._told(site, reply, offers[site].package_bytes) for site, reply in answers.items()}
        for site, stand in stands.items():
            self._status.site(site, stand.state, stand.detail, stand.fetched)
        return stands

    def _check_epoch(self) -> None:
        """Ends a wait for owners who are asked to sign another epoch by now, under which this job is none of theirs."""
        now = self._current().epoch
        if now != self._federation.epoch:
            raise Untrusted(
                f"epoch={now}: the owners' federation changed while this job of epoch {self._federation.epoch} was "
                "waiting; start a new run with --out FOLDER"
            )

    def _without(self, site: str, reason: str) -> _Stand:
        """Returns where a site stands that gave no answer to its offer, or one that could not be opened or read."""
        if why := self._unopened.pop(site, ""):
            return _Stand(REFUSED, cut(why))
        return _Stand(ABSENT if reason == SILENT else REFUSED, reason)

    def _told(self, site: str, reply: codec.OfferReply, package_bytes: int) -> _Stand:
        """Returns where a site stands by its own words; it counts as ready only with its owner's signature."""
        if why := self._learn(site, reply):
            return _Stand(REFUSED, cut(why))
        if reply.state not in TOLD:
            return _Stand(REFUSED, "answered with a state that is none; install the coordinator's release there")
        fetched = min(reply.fetched, package_bytes)
        return _Stand(reply.state, cut(reply.detail), fetched, fetched // max(PIECE, package_bytes // PIECES))

    def _learn(self, site: str, reply: codec.OfferReply) -> str:
        """Keeps what an answer proves, and returns why it proves nothing; empty when all is well."""
        if site not in self._signatures:
            try:
                check_signature(self._federation, site, reply.owner_signature)
            except OffsiteError as error:
                return str(error)
            self._signatures[site] = reply.owner_signature
            self._keep(site, reply.owner_signature)
        self._ledgers.learn(site, reply.ledger)
        return ""
