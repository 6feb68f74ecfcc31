"""The privacy statement of a run, for machines to read: the promise, its holders, and its limits."""

from offsite.coordinator.job.json_form import encode
from offsite.coordinator.report import trust_statement
from offsite.coordinator.report.model import Report
from offsite.coordinator.report.privacy_facts import DELTAS, PrivacyFacts, SitePrivacy, short_delta

FORMAT = 1

NOT_PROTECTED = (
    "several records of one person: the promise is for one record, and weakens with every further one",
    "facts that many records share, for example the style or the topics of a site",
    "losses, gradient norms and batch sizes that a site measures while it trains",
    "records held out for the scores: their losses in the report are computed without noise",
    "rounding of floating-point numbers: the analysis takes noise and sums as exact numbers",
)
NOT_PROTECTED_BETWEEN = (
    *NOT_PROTECTED[:2],
    "losses, gradient norms and batch sizes that a site measures while it trains; they stay on the site's own machine",
    "a score that a site's owner computes on held-out records and gives away; it is computed without noise",
    NOT_PROTECTED[-1],
)

HOLDS_AGAINST = (
    "anyone who sees the updates or the adapter, the coordinator included; secure aggregation is an additional "
    "protection and no part of the epsilon"
)
WITHOUT_PRIVACY = "not private: trained without clipping and without noise; the adapter may reveal training records"
SIMULATED = (
    "one process held the full model, the data of all sites and all their keys; nothing was hidden from who ran it",
    "the noise was derived from the run's seed, so this run is not private against anyone who knows the seed",
)
MECHANISM = (
    "DP-SGD: each record's gradient is clipped to max_grad_norm, and the site adds Gaussian noise of "
    "standard deviation noise_multiplier * max_grad_norm to the sum over the batch"
)
ZERO_ORDER = (
    "DP-ZO: no gradients are taken; each record's losses along public directions are clipped to max_grad_norm, and the "
    "site adds Gaussian noise of standard deviation noise_multiplier * max_grad_norm to the sum over the batch"
)
SCHEME = "Poisson: in every step each record is in the batch with probability sample_rate, independently"
OVER = "all steps of all finished rounds together, never one round alone; a round not taken over counts too"
OVER_BETWEEN = (
    "all steps of all rounds of the job together, spare rounds included, never one round alone; an attempt that failed "
    "after its updates had left, and a round not taken over, count too"
)
DELTA = (
    "of each site: min(1e-6, 1 / (100 records)) for its declared number of records, or the delta_cap of its "
    "policy.toml where that is smaller; so epsilon_at_most holds at 1e-5 and at 1e-6"
)
RELATION = (
    "one record of one site is replaced by an empty record, which adds nothing; the number of records is the same in "
    "both data sets, and public: {declared}"
)
DECLARED = "each site's owner declares it, and noise and sample rate follow from the declared number alone"
COUNTED = "a simulation counts it in the site's file"
BETWEEN_SITES = (
    "nothing is added for a record that one site holds; for a record that several sites hold, their epsilons add up, "
    "and so do their deltas"
)
NUMBERS_OF_A_SITE = (
    "records",
    "epsilon",
    "delta",
    "epsilon_at",
    "noise_multiplier",
    "max_grad_norm",
    "sample_rate",
    "steps",
    "engine",
)


def privacy_statement(report: Report) -> dict[str, object]:
    """Returns the statement of a run, the content of `privacy.json`.

    Returns:
      Plain values. The first key is `private`; when its value is False, the second key, `claim`, says that nothing is
      promised. A job between organisations has further keys: `delta`, `epsilon_at_most`, `site` and `not_known_here`.
    """
    facts, private = report.privacy, report.privacy.private
    return {
        "private": private,
        "claim": _claim(report) if private else WITHOUT_PRIVACY,
        "format": FORMAT,
        "unit": facts.unit,
        "neighbouring_relation": RELATION.format(declared=COUNTED if report.simulated else DECLARED),
        "sampling": _sampling(facts),
        "mechanism": ZERO_ORDER if facts.zero_order else MECHANISM,
        "accountant": facts.accountant,
        "composition": _composition(report),
        "sites": [_site(site, facts) for site in facts.sites],
        "epsilon_largest": facts.largest_epsilon if private else None,
        "delta_largest": facts.largest_delta if private else None,
        "epsilon_largest_at": _largest_at(report),
        "holds_against": HOLDS_AGAINST if private else "nobody",
        "coordinator": trust_statement.coordinator(report),
        "secure_aggregation": trust_statement.secure_aggregation(report),
        "simulated": list(SIMULATED) if report.simulated else [],
        "noise_source": facts.noise_source,
        "not_protected": list(NOT_PROTECTED if report.simulated else NOT_PROTECTED_BETWEEN),
        **({} if report.simulated else _between_organisations(facts)),
    }


def _between_organisations(facts: PrivacyFacts) -> dict[str, object]:
    return {
        "delta": DELTA,
        "epsilon_at_most": facts.target_epsilon,
        "site": trust_statement.site(),
        "not_known_here": encode(facts.not_known_here),
    }


def _claim(report: Report) -> str:
    if report.simulated:
        return (
            f"record-level differential privacy at every site, epsilon at most {report.privacy.largest_epsilon} at "
            f"delta {report.privacy.largest_delta}, over all rounds; see not_protected and simulated"
        )
    return (
        f"record-level differential privacy at every site, epsilon at most {report.privacy.target_epsilon} at delta "
        "1e-6, over the whole job, by the noise that each site's own software plans and adds; the "
        "coordinator cannot know the spent epsilon; see not_protected, site and not_known_here"
    )


def _largest_at(report: Report) -> dict[str, float | None]:
    """Returns epsilon at the deltas of `DELTAS`; between organisations the target, which holds at each of them."""
    facts = report.privacy
    if not facts.private:
        return {}
    if not report.simulated:
        return {short_delta(delta): facts.target_epsilon for delta in DELTAS}
    return {short_delta(delta): facts.largest_epsilon_at(delta) for delta in DELTAS}


def _sampling(facts: PrivacyFacts) -> dict[str, object]:
    sampling: dict[str, object] = {"scheme": SCHEME, "sample_rate_is_public": True}
    if facts.expected_batch is None:
        return sampling
    return sampling | {"expected_batch": facts.expected_batch, "sample_rate": "expected_batch / records, at each site"}


def _composition(report: Report) -> dict[str, object]:
    return {
        "over": OVER if report.simulated else OVER_BETWEEN,
        "rounds_planned": report.rounds_planned,
        "rounds_finished": report.finished_rounds,
        "between_sites": BETWEEN_SITES,
    }


def _site(site: SitePrivacy, facts: PrivacyFacts) -> dict[str, object]:
    numbers = {name: getattr(site, name) for name in NUMBERS_OF_A_SITE}
    by = {} if site.epsilon_by is None else {"epsilon_by": site.epsilon_by}
    return {"site": site.site, **numbers, **by, **({} if facts.private else {"epsilon": None})}
