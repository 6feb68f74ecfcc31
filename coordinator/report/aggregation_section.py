"""The section of a report on the server rule: who was in it, what it was shown, and what that cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from offsite.coordinator.aggregation.rules import Aggregator
from offsite.coordinator.report.formatting import number, size
from offsite.coordinator.report.sections import Report, Section

IN_THE_OPEN = (
    "Secure aggregation was OFF: the coordinator saw each site's own update in every round. What protects a site's "
    "records from it is the noise that the site had added, if any, and nothing else."
)

SAID_OPENLY = "secure aggregation is OFF: the coordinator sees each site's own update, with the site's noise, if any"


def facts_of(rule: Aggregator) -> dict[str, Any]:
    """Returns what a report says of a rule."""
    return {"rule": rule.name, "needs": rule.needs, "linear": rule.linear, "why": rule.why}


def left_out(dropped: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the lines of a table of who dropped out of which round and why; none where nobody did."""
    if not dropped:
        return []
    rows = [f"| {one['site']} | {one['round']} | {one['stage']} | {_cell(one['reason'])} |" for one in dropped]
    head = ["| site | round | stage | reason |", "|---|---|---|---|"]
    return ["These sites dropped out of a round:", "", *head, *rows, ""]


def rule_text(facts: Mapping[str, Any]) -> str:
    """Returns a sentence on the server rule, from what `facts_of` gives."""
    straight = (
        "what it makes of an upload is linear in it, so noise in the one stays as it is in the other"
        if facts["linear"]
        else "what it makes of an upload is not linear in it"
    )
    return f"The server rule {facts['rule']}: {facts['why']}; {straight}."


def aggregation(report: Report) -> Section:
    """Returns the section on who was in the last round, and what it cost."""
    facts = report["secagg"]
    rows = tuple((str(d["site"]), str(d["round"]), str(d["stage"]), str(d["reason"])) for d in facts["dropped"])
    told = _sums(facts) if facts["enabled"] else _updates(facts)
    return Section(
        "Secure aggregation" if facts["enabled"] else "No secure aggregation",
        (
            told,
            rule_text(report["aggregation"]),
            "No site dropped out." if not rows else "These sites dropped out of a round:",
        ),
        ("site", "round", "stage", "reason") if rows else (),
        rows,
    )


def _sums(facts: Mapping[str, Any]) -> str:
    overhead = facts["upload_bytes"] / facts["payload_bytes"] if facts["payload_bytes"] else None
    return (
        "Secure aggregation adds the sites' updates under masks that cancel, so that the coordinator learns only "
        f"the sum. {len(facts['members'])} sites are in the last sum ({', '.join(map(str, facts['members']))}); "
        f"a sum is opened only if at least {facts['threshold']} get through. One site's masked upload was "
        f"{size(facts['upload_bytes'])}, {number(overhead, 3)} times its plain 32-bit numbers."
    )


def _updates(facts: Mapping[str, Any]) -> str:
    return (
        f"{IN_THE_OPEN} {len(facts['members'])} sites are in the last round ({', '.join(map(str, facts['members']))}); "
        f"a round needs {facts['threshold']}. One site's upload was {size(facts['upload_bytes'])}."
    )


def _cell(text: str) -> str:
    """Returns a text that may be a site's own as it stands in a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")
