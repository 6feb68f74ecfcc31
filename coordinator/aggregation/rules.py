"""The table of aggregation rules, by which the sites' uploads become the next adapter."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from offsite.coordinator.aggregation.factor_rules import flexlora, olora
from offsite.coordinator.aggregation.mean_rules import fedadam, fedavgm, fedyogi, mean
from offsite.coordinator.aggregation.robust_rules import krum, median, trimmed_mean
from offsite.coordinator.aggregation.state import RuleSettings, ServerState
from offsite.protos.aggregation import ALTERNATED, RANKED

__all__ = ["AGGREGATORS", "INDIVIDUALS", "REFUSED", "SUM", "Aggregator", "RuleSettings", "ServerState"]
SUM, INDIVIDUALS = "sum", "individuals"
Step = Callable[[ServerState, np.ndarray, RuleSettings], ServerState]


@dataclass(frozen=True)
class Aggregator:
    """One aggregation rule.

    Attributes:
      name: key in `AGGREGATORS`.
      step: (state, updates, settings) -> next state; pure. Updates are float64 in the adapter's layout: the members'
        mean (d,) for a rule that needs the sum, else each member's update (n, d).
      needs: `SUM`, which secure aggregation gives, or `INDIVIDUALS`, which only a job without it gives.
      linear: whether the next adapter is an affine function of the upload, so that noise in the upload stays unbiased.
      why: a sentence for the report on what the rule does.
      methods: adapter methods that the rule fits; () fits any.
      keys: settings of [aggregation] that the rule needs; all other rules leave them at 0 or empty.
      alternate: whether sites train LoRA's factors in turn.
    """

    name: str
    step: Step
    needs: str
    linear: bool
    why: str
    methods: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    alternate: bool = False


_TABLE = (
    Aggregator("mean", mean, SUM, True, "the mean update is added as it is"),
    Aggregator("fedavgm", fedavgm, SUM, True, "a running sum of mean updates is added"),
    Aggregator("fedadam", fedadam, SUM, False, "each entry of the mean update is divided by its own running size"),
    Aggregator(
        "fedyogi", fedyogi, SUM, False, "each entry of the mean update is divided by its own size, which fades slowly"
    ),
    Aggregator(
        "fedprox",
        mean,
        SUM,
        True,
        "each step at a site is pulled back to where the round began, and the mean update is added as it is",
        keys=("proximal",),
    ),
    Aggregator(
        "rolora",
        mean,
        SUM,
        True,
        "B and A are trained in turn, so that each round's mean is the mean of the effects B A",
        methods=(ALTERNATED,),
        alternate=True,
    ),
    Aggregator(
        "nested",
        mean,
        SUM,
        True,
        "sites of smaller rank train the first columns of B, and each entry is divided by how many trained it",
        methods=(RANKED,),
        keys=("ranks",),
    ),
    Aggregator(
        "olora",
        olora,
        SUM,
        True,
        "the mean update is added, then A is moved out of the row spaces of earlier adapters",
        methods=(ALTERNATED,),
        keys=("penalty", "earlier"),
    ),
    Aggregator(
        "krum",
        krum,
        INDIVIDUALS,
        False,
        "the one update that is nearest to most others is added, and those of the other sites are lost",
        keys=("faulty",),
    ),
    Aggregator("median", median, INDIVIDUALS, False, "the median of each entry over the sites is added"),
    Aggregator(
        "trimmed_mean",
        trimmed_mean,
        INDIVIDUALS,
        False,
        "the mean of each entry is added, without its largest and smallest values",
        keys=("faulty",),
    ),
    Aggregator(
        "flexlora",
        flexlora,
        INDIVIDUALS,
        False,
        "the mean of the products B A is cut back to the adapter's rank, so that only what is beyond it is lost",
        methods=(ALTERNATED,),
    ),
)
AGGREGATORS: dict[str, Aggregator] = {rule.name: rule for rule in _TABLE}

REFUSED = {
    "flora": "its stacked factors (arXiv 2409.05976) have the rank of all sites together, and are exact only if each "
    "site merges them into its weights and begins anew; an adapter's layout is fixed and a package's weights are "
    "hashed; flexlora goes on from the best approximation that fits",
    "fedex": "its residual (arXiv 2410.09432) changes the base weights of the slots, which sites hold as they were "
    "vetted and hashed; flexlora keeps the part that fits the rank, and the adapter method ffa_lora has no residual",
    "ffa": "ffa is an adapter method and not a rule; set adapter.method = 'ffa_lora' and take the rule mean",
}
"""Well-known rules that do not work here: name -> reason, and the rule to take instead."""
