"""The trust statement of a run: the coordinator, secure aggregation, and a site's own software."""

from offsite.coordinator.report.model import Report

HIDDEN, NOISED = (
    "the update of a single site; secure aggregation hides it",
    ", and the noise of the site is already in it",
)
SEEN = "the update of every single site, {noise}: this run had no secure aggregation"
ADAPTER = "the final adapter, and after every round the sum of the sites' updates"
PUBLIC = "public records, on which it evaluates and decides whether a round is taken over"
SEES = (ADAPTER, "how many records each site has, and which sites took part in each round", PUBLIC)
SEES_BETWEEN = (
    ADAPTER,
    "which sites took part in each round, why a site dropped out, and how many entries each site's privacy ledger has",
    "the kind of each refusal of a site, one constant sentence; a refusal may follow from the site's declared number "
    "of records, which counts as public, and never from a record",
    PUBLIC,
)
RECORD = "a record of any site"
CAN_STILL = ("block a round, or leave a site out of it", "choose a bad emulator or adapter, which costs quality")
OF_A_SITE = (
    "each site's own software samples, clips, draws the noise and keeps the ledger; the coordinator cannot check that",
    "a site that runs other software breaks the promise to its own records, and to no other site's",
)

DOES_NOT_COVER = (
    "it is not differential privacy: it hides who said what, and says nothing about what the sum reveals",
    "the sum itself is open to the coordinator, and the adapter made of it to every site",
    "all other sites together can subtract their own updates from the sum and are left with the last one's",
    "a malicious site can spoil a round with a bad update; it cannot read anything by that",
    "the number of records of a site is public",
    "the emulator shows part of the model to every site",
)


def coordinator(report: Report) -> dict[str, object]:
    """Returns what the coordinator sees, what nobody has to trust it with, and what it can still do."""
    sees = list(SEES if report.simulated else SEES_BETWEEN)
    enabled, hidden = report.secagg.enabled, HIDDEN + (NOISED if report.privacy.private else "")
    return {
        "sees": sees if enabled else [_seen(report), *sees],
        "is_not_trusted_with": [RECORD, hidden] if enabled else [RECORD],
        "can_still": list(CAN_STILL),
    }


def secure_aggregation(report: Report) -> dict[str, object]:
    """Returns the promise of secure aggregation, and the limits of this promise."""
    secagg = report.secagg
    if not secagg.enabled:
        claim = f"none: the coordinator sees {_seen(report)}"
        return {"enabled": False, "members": list(secagg.members), "claim": claim}
    return {
        "enabled": True,
        "suite": secagg.suite,
        "members": list(secagg.members),
        "threshold": secagg.threshold,
        "accomplices": secagg.accomplices,
        "claim": "the coordinator learns only the sum of the quantised updates of at least threshold sites, even if it "
        f"cheats and up to {secagg.accomplices} of all {secagg.sites} sites help it; it can block a round",
        "does_not_cover": list(DOES_NOT_COVER),
    }


def site() -> list[str]:
    """Returns the tasks that a site's owner trusts the site's own software with."""
    return list(OF_A_SITE)


def _seen(report: Report) -> str:
    return SEEN.format(noise="with the site's noise in it" if report.privacy.private else "without any noise")
