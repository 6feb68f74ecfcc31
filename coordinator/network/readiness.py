"""Which sites are ready: a job is offered to every site until enough have accepted, fetched and loaded it."""

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
REPORTED_STATES = (FETCHING, WAITING, READY, REFUSED)  # states that a site may report
# Fetched bytes of the package count as progress by whole pieces: a site could report single bytes for ever.
PIECE, PIECES = 1 << 20, 64
SILENT = "did not answer"
TOLD = 8  # most changes of one site that a person reads about; a site could change for ever


@dataclass(frozen=True)
class ReadinessPolicy:
    """When a wait for ready sites ends.

    Attributes:
      wanted: number of sites that should be ready before the first round.
      min_sites: fewest sites of a round.
      patience: seconds without any progress after which the wait ends.
    """

    wanted: int
    min_sites: int
    patience: float


@dataclass(frozen=True)
class _SiteState:
    """State of one site.

    Attributes:
      state: `fetching`, `waiting`, `ready`, `refused` or `absent`.
      detail: reason for the state, one line.
      fetched: bytes of the package at the site.
      pieces: whole pieces of the package at the site.
    """

    state: str
    detail: str
    fetched: int = 0
    pieces: int = 0


class _WaitProgress:
    """Progress of all sites in one wait; going back and forth, or up without end, does not count."""

    def __init__(self) -> None:
        self._states: set[tuple[str, str]] = set()
        self._pieces: dict[str, int] = {}

    def note(self, states: Mapping[str, _SiteState]) -> bool:
        """Returns whether a site is in a state for the first time, or has a further piece of the package."""
        moved = [self._note(site, site_state) for site, site_state in states.items()]
        return any(moved)

    def _note(self, site: str, site_state: _SiteState) -> bool:
        known, further = (site, site_state.state) in self._states, site_state.pieces > self._pieces.get(site, 0)
        self._states.add((site, site_state.state))
        self._pieces[site] = max(site_state.pieces, self._pieces.get(site, 0))
        return further or not known


class ReadinessPoller:
    """Offers one job and keeps the sites' signatures and ledger heads.

    Args:
      exchange: exchange with the sites.
      federation: federation whose members get the offer.
      offer_for: returns the offer for a site, from the owners' signatures that are known.
      signatures: owners' signatures by site; completed here.
      ledgers: countersigned heads of the sites' ledgers.
      status: receiver of each site's state.
      keep: called with (site, signature) for each new signature.
      unopened: reason by site why an answer could not be opened; read and emptied here.
      current: returns the epoch that holds now; the owners may sign another epoch while a job waits.
      on_refusal: called with a sentence once for each site that refuses the job, and again if it refuses after it was
        ready.
      on_change: called with the states of all sites in one line, when a site comes into a state for the first time.
      clock: returns seconds that only go up.
      sleep: waits for a number of seconds.
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
        on_refusal: Callable[[str], None] = lambda text: None,
        on_change: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._exchange, self._federation, self._offer_for = exchange, federation, offer_for
        self._signatures, self._ledgers, self._status, self._keep = signatures, ledgers, status, keep
        self._unopened, self._current, self._on_refusal = unopened, current, on_refusal
        self._on_change = on_change
        self._refused: set[str] = set()  # a site that changes its reasons for ever gets one line
        self._told: dict[str, set[tuple[str, str]]] = {}  # states and reasons that a person knows of, by site
        self._clock, self._sleep = clock, sleep

    def wait(self, policy: ReadinessPolicy) -> tuple[str, ...]:
        """Returns the ready sites once enough sites are ready; waits as long as there is progress.

        Raises:
          TooFewSurvivors: there was no progress for `patience` seconds, and fewer sites are ready than a round needs.
          Untrusted: sites are missing, and the federation has another epoch than the job.
        """
        progress, moved = _WaitProgress(), self._clock()
        while True:
            states = self._offer_once()
            ready = tuple(sorted(site for site, site_state in states.items() if site_state.state == READY))
            if len(ready) >= policy.wanted:
                return ready
            if progress.note(states):
                moved = self._clock()
            if self._clock() - moved > policy.patience:
                if len(ready) >= policy.min_sites:
                    return ready
                self._check_epoch()
                raise TooFewSurvivors(
                    f"sites={len(ready)} ready, {policy.min_sites} are needed: {self._status.reasons()}; nothing moved "
                    f"for {policy.patience:g} s; start the missing clients and run again"
                )
            self._sleep(POLL_SECONDS)

    def _offer_once(self) -> dict[str, _SiteState]:
        """Offers the job once, and returns each site's state."""
        sites = [member.site for member in self._federation.members]
        talk = Conversation(self._exchange)
        offers = {site: self._offer_for(site, self._signatures) for site in sites}
        answers = talk.ask("offer", offers, codec.OfferReply)
        if any(site not in self._signatures for site in sites):  # with every signature, the job runs on under its epoch
            self._check_epoch()
        states = {refused.site: self._state_without_answer(refused.site, refused.reason) for refused in talk.refused}
        states |= {
            site: self._state_of_answer(site, reply, offers[site].package_bytes) for site, reply in answers.items()
        }
        for site, site_state in states.items():
            self._status.site(site, site_state.state, site_state.detail, site_state.fetched)
            self._tell(site, site_state)
        news = [site for site, site_state in states.items() if self._is_news(site, site_state)]
        if news:
            self._on_change(_in_one_line(states))
        return states

    def _is_news(self, site: str, site_state: _SiteState) -> bool:
        """Returns whether a site is in a state, with this reason, for the first time; never after `TOLD` changes."""
        known = self._told.setdefault(site, set())
        change = (site_state.state, "" if site_state.state == REFUSED else site_state.detail)
        if change in known or len(known) == TOLD:
            return False
        known.add(change)
        return True

    def _tell(self, site: str, site_state: _SiteState) -> None:
        """Tells at once that a site refuses; the wait for other sites goes on, since an owner may mend the cause."""
        if site_state.state == READY:
            self._refused.discard(site)
        elif site_state.state == REFUSED and site not in self._refused:
            self._refused.add(site)
            self._on_refusal(f"site {site} refused: {site_state.detail or 'without a reason'}")

    def _check_epoch(self) -> None:
        """Ends the wait when the federation has a newer epoch, since its owners will not sign this job's epoch now."""
        now = self._current().epoch
        if now != self._federation.epoch:
            raise Untrusted(
                f"epoch={now}: the owners' federation changed while this job of epoch {self._federation.epoch} was "
                "waiting; start a new run with --out FOLDER"
            )

    def _state_without_answer(self, site: str, reason: str) -> _SiteState:
        """Returns the state of a site whose answer is missing, or could not be opened or read."""
        if why := self._unopened.pop(site, ""):
            return _SiteState(REFUSED, cut(why))
        return _SiteState(ABSENT if reason == SILENT else REFUSED, reason)

    def _state_of_answer(self, site: str, reply: codec.OfferReply, package_bytes: int) -> _SiteState:
        """Returns the state that a site reports; without its owner's signature the site counts as refused."""
        if why := self._learn(site, reply):
            return _SiteState(REFUSED, cut(why))
        if reply.state not in REPORTED_STATES:
            return _SiteState(REFUSED, "answered with an unknown state; install the coordinator's release there")
        fetched = min(reply.fetched, package_bytes)
        return _SiteState(reply.state, cut(reply.detail), fetched, fetched // max(PIECE, package_bytes // PIECES))

    def _learn(self, site: str, reply: codec.OfferReply) -> str:
        """Keeps what an answer proves; returns why it proves nothing, empty when all is well."""
        if site not in self._signatures:
            try:
                check_signature(self._federation, site, reply.owner_signature)
            except OffsiteError as error:
                return str(error)
            self._signatures[site] = reply.owner_signature
            self._keep(site, reply.owner_signature)
        self._ledgers.learn(site, reply.ledger)
        return ""


def _in_one_line(states: Mapping[str, _SiteState]) -> str:
    """Returns the sites by state and reason; a refusal has a line of its own, with its reason."""
    groups = dict[str, list[str]]()
    for site, own in sorted(states.items()):
        reason = "" if own.state in (REFUSED, ABSENT) else own.detail
        groups.setdefault(f"{own.state} ({reason})" if reason else own.state, []).append(site)
    return "sites: " + "; ".join(f"{state}: {', '.join(sites)}" for state, sites in sorted(groups.items()))
