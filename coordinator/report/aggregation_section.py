"""The section of a report on the server rule: the sites of the last round, and the size of an upload."""

from offsite.coordinator.report.formatting import number, size
from offsite.coordinator.report.model import Report, RuleFacts, SecaggFacts
from offsite.coordinator.report.section import Section
from offsite.protos.aggregation import NO_SECAGG_WARNING

IN_THE_OPEN = f"{NO_SECAGG_WARNING[:1].upper()}{NO_SECAGG_WARNING[1:]}."


def aggregation(report: Report) -> Section:
    """Returns the section on the sites of the last round, the size of an upload, and the server rule."""
    facts = report.secagg
    rows = tuple((drop.site, str(drop.round), drop.stage, drop.reason) for drop in facts.dropped)
    return Section(
        "Secure aggregation" if facts.enabled else "No secure aggregation",
        (
            _sums(facts) if facts.enabled else _updates(facts),
            rule_text(report.aggregation),
            "No site dropped out." if not rows else "These sites dropped out of a round:",
        ),
        ("site", "round", "stage", "reason") if rows else (),
        rows,
    )


def rule_text(facts: RuleFacts) -> str:
    """Returns a sentence on the server rule."""
    linearity = (
        "the result is linear in each upload, so the noise of an upload stays as it is in the result"
        if facts.linear
        else "the result is not linear in an upload"
    )
    return f"The server rule {facts.rule}: {facts.why}; {linearity}."


def _sums(facts: SecaggFacts) -> str:
    overhead = facts.upload_bytes / facts.payload_bytes if facts.payload_bytes else None
    return (
        "Secure aggregation adds the sites' updates under masks that cancel, so that the coordinator learns only "
        f"the sum. {len(facts.members)} sites are in the last sum ({', '.join(facts.members)}); "
        f"a sum is opened only if at least {facts.threshold} get through. One site's masked upload was "
        f"{size(facts.upload_bytes)}, {number(overhead, 3)} times the size of its plain 32-bit numbers."
    )


def _updates(facts: SecaggFacts) -> str:
    return (
        f"{IN_THE_OPEN} {len(facts.members)} sites are in the last round ({', '.join(facts.members)}); "
        f"a round needs at least {facts.threshold}. One site's upload was {size(facts.upload_bytes)}."
    )
