"""An owner's consent to a federation beyond the fingerprint of its welcome: members that the owner does not know."""

from collections.abc import Mapping
from dataclasses import dataclass

from offsite.client.home.audit import Audit
from offsite.client.home.settings import SiteSettings
from offsite.errors import Untrusted
from offsite.trust.certificates import digits_of
from offsite.trust.federation_manifest import FederationManifest

MEMBERS_CONFIRMED, WEAKER_SIGNED = "members confirmed", "weaker federation signed"


@dataclass(frozen=True)
class Consent:
    """The owner's consent to one epoch.

    Attributes:
      members: fingerprints of members that `known` of `site.toml` does not name.
      weaker: sentence of a federation that withstands fewer helpers than usual.
    """

    members: tuple[str, ...] = ()
    weaker: str = ""


def strangers(settings: SiteSettings, federation: FederationManifest, audit: Audit) -> dict[str, str]:
    """Returns the fingerprints of the members that the owner neither names nor confirmed before, by site.

    Args:
      settings: content of `site.toml`; an owner who names nobody has no strangers.
      federation: federation manifest with this site as a member.
      audit: audit log of the site, which keeps whom the owner confirmed.
    """
    if not settings.known:
        return {}
    links = [link for link in audit.entries() if link.kind == MEMBERS_CONFIRMED]
    confirmed = [digits for link in links for digits in link.fields["members"].values()]
    known = {digits_of(fingerprint) for fingerprint in (*settings.known, *confirmed)}
    others = (member.site for member in federation.members if member.site != settings.name)
    fingerprints = {site: federation.fingerprint_of(site) for site in others}
    return {site: digits for site, digits in fingerprints.items() if digits_of(digits) not in known}


def check_consent(federation: FederationManifest, unknown: Mapping[str, str], consent: Consent) -> None:
    """Checks that the owner consented to every stranger, and to the sentence of a weaker federation.

    Args:
      federation: federation manifest.
      unknown: fingerprints of the members that the owner neither names nor confirmed before, by site.
      consent: the owner's consent.

    Raises:
      Untrusted: the owner did not consent.
    """
    confirmed = {digits_of(fingerprint) for fingerprint in consent.members}
    if refused := [site for site, digits in unknown.items() if digits_of(digits) not in confirmed]:
        raise Untrusted(
            f"members={', '.join(refused)}: their fingerprints are not among known in site.toml; call their owners on "
            "a number that is not from the coordinator, then confirm them at offsite client sign, or add them to known"
        )
    if consent.weaker != federation.weaker:
        raise Untrusted(
            f"epoch {federation.epoch} of {federation.name!r} withstands fewer helpers than usual, and its owner has "
            "not signed that sentence; offsite client sign asks for it"
        )
