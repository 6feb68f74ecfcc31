"""The privacy statement of a run, for machines to read: what is promised, to whom, and what is not."""

import math
from collections.abc import Mapping
from typing import Any

FORMAT = 1

HIDDEN = "the update of a single site; secure aggregation hides it, and the noise of the site is already in it"
SEEN = "the update of every single site, {noise}: this run had no secure aggregation"
COORDINATOR_TRUST = {
    "sees": [
        "the final adapter, and after every round the sum of the sites' updates",
        "how many records each site has, and which sites took part in each round",
        "public records, on which it evaluates and decides whether a round is taken over",
    ],
    "is_not_trusted_with": ["a record of any site", HIDDEN],
    "can_still": [
        "block a round, or leave a site out of it",
        "choose a bad emulator or adapter, which costs quality",
    ],
}

NOT_COVERED_BY_SECURE_AGGREGATION = [
    "it is not differential privacy: it hides who said what, and says nothing about what the sum reveals",
    "the sum itself is open to the coordinator, and the adapter made of it to every site",
    "all other sites together can subtract their own updates from the sum and are left with the last one's",
    "a malicious site can spoil a round with a bad update; it cannot read anything by that",
    "the number of records of a site is public",
    "the emulator shows part of the model to every site",
]

NOT_PROTECTED = [
    "several records of one person: the promise is for one record, and weakens with every further one",
    "facts that many records share, for example the style or the topics of a site",
    "losses, gradient norms and batch sizes that a site measures while it trains",
    "the losses on held-out private text in the report; they are computed without noise",
    "rounding of floating-point numbers: the analysis takes noise and sums as exact numbers",
]

HOLDS_AGAINST = (
    "anyone who sees the updates or the adapter, the coordinator included; secure aggregation is an additional "
    "protection and no part of the epsilon"
)
WITHOUT_PRIVACY = "not private: trained without clipping and without noise; the adapter may reveal training records"
SIMULATED = [
    "one process held the full model, the data of all sites and all their keys; nothing was hidden from who ran it",
    "the noise was derived from the run's seed, so this run is not private against anyone who knows the seed",
]


def privacy_statement(report: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the statement of a run, the content of `privacy.json`.

    Args:
      report: what `write_report` takes.

    Returns:
      Plain values; the first key is `private`, and when it is False the second, `claim`, says that nothing is promised.
    """
    privacy = report["privacy"]
    private = bool(privacy["private"])
    return {
        "private": private,
        "claim": _claim(privacy) if private else WITHOUT_PRIVACY,
        "format": FORMAT,
        "unit": privacy["unit"],
        "neighbouring_relation": "add or remove one record of one site; the number of records is taken as public",
        "sampling": {
            "scheme": "Poisson: in every step each record is in the batch with probability sample_rate, independently",
            "sample_rate_is_public": True,
        },
        "mechanism": "DP-SGD: each record's gradient is clipped to max_grad_norm, and the site adds Gaussian noise of "
        "standard deviation noise_multiplier * max_grad_norm to the sum over the batch",
        "accountant": privacy["accountant"],
        "composition": _composition(report),
        "sites": [_site(site, private) for site in privacy["sites"]],
        "epsilon_largest": largest_epsilon(privacy) if private else None,
        "holds_against": HOLDS_AGAINST if private else "nobody",
        "coordinator": _coordinator(report),
        "secure_aggregation": _secure_aggregation(report),
        "simulated": SIMULATED if report["mode"] == "simulation" else [],
        "noise_source": privacy.get("noise_source", "unknown"),
        "not_protected": NOT_PROTECTED,
    }


def largest_epsilon(privacy: Mapping[str, Any]) -> float | None:
    """Returns the largest epsilon of any site, or None when one of them is not finite."""
    values = [site["epsilon"] for site in privacy["sites"]]
    if not values or any(value is None or not math.isfinite(value) for value in values):
        return None
    return float(max(values))


def _claim(privacy: Mapping[str, Any]) -> str:
    return (
        f"record-level differential privacy at every site, epsilon at most {largest_epsilon(privacy)} at the delta of "
        "each site, over all rounds; see not_protected and simulated"
    )


def _composition(report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "over": "all steps of all finished rounds together, never one round alone; a round not taken over counts too",
        "rounds_planned": report["rounds_planned"],
        "rounds_finished": report["finished_rounds"],
        "between_sites": "none needed: a record belongs to one site; epsilons of different sites are not added",
    }


def _site(site: Mapping[str, Any], private: bool) -> dict[str, Any]:
    names = (
        "site",
        "records",
        "epsilon",
        "delta",
        "noise_multiplier",
        "max_grad_norm",
        "sample_rate",
        "steps",
        "engine",
    )
    facts = {name: site[name] for name in names}
    return facts if private else facts | {"epsilon": None}


def _coordinator(report: Mapping[str, Any]) -> dict[str, Any]:
    if report["secagg"]["enabled"]:
        return dict(COORDINATOR_TRUST)
    trusted = [one for one in COORDINATOR_TRUST["is_not_trusted_with"] if one != HIDDEN]
    return COORDINATOR_TRUST | {"sees": [_seen(report), *COORDINATOR_TRUST["sees"]], "is_not_trusted_with": trusted}


def _seen(report: Mapping[str, Any]) -> str:
    private = report["privacy"]["private"]
    return SEEN.format(noise="with the site's noise in it" if private else "without any noise")


def _secure_aggregation(report: Mapping[str, Any]) -> dict[str, Any]:
    secagg = report["secagg"]
    if not secagg["enabled"]:
        return {"enabled": False, "members": secagg["members"], "claim": f"none: the coordinator sees {_seen(report)}"}
    return {
        "enabled": True,
        "suite": secagg["suite"],
        "members": secagg["members"],
        "threshold": secagg["threshold"],
        "claim": "the coordinator learns only the sum of the quantised updates of at least threshold sites, even if it "
        "cheats and up to a third of the sites help it; it can block a round",
        "does_not_cover": NOT_COVERED_BY_SECURE_AGGREGATION,
    }
