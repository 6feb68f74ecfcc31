"""The section of a report on privacy, and the sentence on privacy in its answer."""

from collections.abc import Sequence

from offsite.coordinator.report.formatting import NONE, count, number, short
from offsite.coordinator.report.model import Report
from offsite.coordinator.report.privacy_facts import DELTAS, PrivacyFacts, SitePrivacy, short_delta
from offsite.coordinator.report.privacy_statement import WITHOUT_PRIVACY
from offsite.coordinator.report.section import Rows, Section

HEAD = (
    *("site", "records", "epsilon", "delta", "epsilon at 1e-5", "epsilon at 1e-6"),
    *("noise multiplier", "clip", "sample rate", "steps"),
)
HEAD_BETWEEN = ("site", "rounds with its update", "clip", "epsilon at most, at delta 1e-6")
BOUND = "Epsilon bounds how much the result can depend on any one record; smaller is more private."


def privacy(report: Report) -> Section:
    """Returns the section on each site's privacy numbers, or on the numbers that the coordinator cannot know."""
    facts = report.privacy
    if not report.simulated:
        return _between_organisations(facts)
    rows = tuple(
        (
            site.site,
            count(site.records),
            number(site.epsilon, 2),
            short(site.delta),
            *(number((site.epsilon_at or {}).get(short_delta(delta)), 2) for delta in DELTAS),
            short(site.noise_multiplier),
            short(site.max_grad_norm),
            short(site.sample_rate),
            count(site.steps),
        )
        for site in facts.sites
    )
    if not facts.private:
        return Section("Privacy", (_without(),), HEAD, rows, numbers=True)
    return Section(
        "Privacy",
        (
            f"{_protected(facts)} In each step a record is drawn with the probability in the column "
            '"sample rate", its gradient is cut to the length "clip", and Gaussian noise of "noise multiplier" times '
            '"clip" is added.',
            f"Epsilon and delta hold for all rounds together, computed by the accountant {_accountant(facts)}. "
            f"{_engines(facts.sites)}Noise: {facts.noise_source}. The file privacy.json says what is not protected.",
        ),
        HEAD,
        rows,
        "epsilon" if rows else "",
        numbers=True,
    )


def _accountant(facts: PrivacyFacts) -> str:
    """Returns the accountant's name, and where the epsilons are known, which of its two bounds it took."""
    taken = sorted({site.epsilon_by for site in facts.sites if site.epsilon_by is not None})
    smaller = f" (by {' and '.join(taken)}, the smaller of its bounds)" if taken and facts.accountant == "pld" else ""
    return f"{facts.accountant}{smaller}"


def privacy_line(report: Report) -> str:
    """Returns the privacy promise, in two or three sentences."""
    facts = report.privacy
    if not facts.private:
        return _without()
    if not report.simulated:
        return (
            "Every record that a site trained on is protected by differential privacy with epsilon "
            f"{number(facts.target_epsilon, 2)} at most at delta 1e-6 over the whole job, by the noise that each "
            f"site's own software plans and adds. The coordinator cannot know the epsilon that a site has spent. "
            f"{BOUND}"
        )
    return (
        "Every record that a site trained on is protected by differential privacy with epsilon "
        f"{number(facts.largest_epsilon, 2)} at most at delta {short(facts.largest_delta)} over all "
        f"{report.finished_rounds} rounds. The records held out for the scores above are not: their scores have no "
        f"noise. {BOUND}"
    )


def _between_organisations(facts: PrivacyFacts) -> Section:
    rows: Rows = tuple(
        (site.site, count(site.rounds), short(site.max_grad_norm), number(facts.target_epsilon, 2))
        for site in facts.sites
    )
    if not facts.private:
        plain = tuple((site, rounds, NONE, NONE) for site, rounds, *_ in rows)
        return Section("Privacy", (_without(),), HEAD_BETWEEN, plain, numbers=True)
    return Section(
        "Privacy",
        (
            f"{_protected(facts)} In each step a site draws each of its records with the same probability, "
            f"chosen so that {facts.expected_batch} records are drawn on average. {_clipped(facts)} "
            "The site then adds Gaussian noise.",
            "Each site plans its noise before it trains, so that all rounds of the job together, spare rounds "
            f"included, spend no more than the epsilon in the table by the accountant {facts.accountant}. A site's "
            "delta is min(1e-6, 1 / (100 records)) for its declared number of records, or less where its owner says "
            "so; at 1e-5 epsilon is smaller still. A site refuses a job for which its ledger or its "
            f"owner's policy has no room. Noise: {facts.noise_source}.",
            " ".join(facts.not_known_here or ()),
            "The file privacy.json says what is not protected.",
        ),
        HEAD_BETWEEN,
        rows,
        numbers=True,
    )


def _protected(facts: PrivacyFacts) -> str:
    return (
        f"What is protected: {facts.unit}. The promise compares two data sets with the same, public number of records: "
        "one of them has an empty record in the place of one record."
    )


def _clipped(facts: PrivacyFacts) -> str:
    if facts.zero_order:
        return 'No gradients are taken: each record\'s losses along public directions are cut to the length "clip".'
    return 'Each drawn record\'s gradient is cut to the length "clip".'


def _without() -> str:
    return f"This run was {WITHOUT_PRIVACY}."


def _engines(sites: Sequence[SitePrivacy]) -> str:
    """Returns a sentence on the engine of each record's own contribution, which a real site keeps to itself."""
    engines = sorted({site.engine for site in sites if site.engine})
    if not engines:
        return ""
    if engines == ["zero_order"]:
        return "No gradients were taken: each record's losses along public directions were clipped instead. "
    return f"Each record's own gradient comes from the engine {' or '.join(engines)}, which the start-up probe chose. "
