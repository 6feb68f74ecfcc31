"""Whether an aggregation rule fits the rest of a federation file, checked before the first slow step."""

from collections.abc import Callable, Collection

from offsite.coordinator.aggregation.factor_rules import read_earlier
from offsite.coordinator.aggregation.rules import AGGREGATORS, INDIVIDUALS, REFUSED, SUM, Aggregator
from offsite.coordinator.config.federation_file import FedConfig
from offsite.errors import ConfigError, lookup, nearest

KEYS = ("proximal", "faulty", "penalty", "earlier", "ranks")  # settings that belong to some rules only


def check_rule(config: FedConfig, sites: Collection[str], n_min: int) -> Aggregator:
    """Returns the rule of a configuration.

    Args:
      config: the federation file.
      sites: names of the federation's sites.
      n_min: fewest sites of a round, by the file and by the manifest that the owners signed.

    Raises:
      UnknownName: there is no such rule.
      ConfigError: the rule needs updates that secure aggregation hides, another adapter method, or other numbers.
      DataError: an earlier adapter cannot be read.
    """
    name = config.aggregation.rule
    if name in REFUSED:
        raise ConfigError(f"aggregation.rule={name!r}: does not work here: {REFUSED[name]}")
    rule = lookup(AGGREGATORS, name, "aggregation.rule")
    if rule.needs == INDIVIDUALS and config.secagg.enabled:
        sums = ", ".join(known.name for known in AGGREGATORS.values() if known.needs == SUM)
        raise ConfigError(
            f"aggregation.rule={name!r}: needs each site's own update, and secure aggregation shows only their sum; "
            f"set secagg.enabled = false, which every site's owner has to permit, or take another rule: {sums}"
        )
    if rule.methods and config.adapter.method not in rule.methods:
        raise ConfigError(
            f"aggregation.rule={name!r}: is for adapter.method {' or '.join(rule.methods)}, not "
            f"{config.adapter.method!r}; change the rule or the method"
        )
    _check_keys(config, rule)
    if config.training.directions and not _takes_directions(rule):
        fitting = ", ".join(known.name for known in AGGREGATORS.values() if _takes_directions(known))
        raise ConfigError(
            f"training.directions={config.training.directions}: DP-ZO uploads its way along directions, and "
            f"rule={name!r} needs parts of an adapter, other steps or single updates; take one of {fitting}"
        )
    if (check := CHECKS.get(name)) is not None:
        check(config, sites, n_min)
    return rule


def _takes_directions(rule: Aggregator) -> bool:
    return rule.needs == SUM and not (rule.alternate or rule.methods or rule.keys)


def _check_keys(config: FedConfig, rule: Aggregator) -> None:
    for key in KEYS:
        value = getattr(config.aggregation, key)
        if value and key not in rule.keys:
            users = ", ".join(known.name for known in AGGREGATORS.values() if key in known.keys)
            raise ConfigError(
                f"aggregation.{key}: has no use with rule={rule.name!r}; remove the key, or take the rule {users}"
            )
        if not value and key in rule.keys:
            raise ConfigError(f"aggregation.{key}: rule={rule.name!r} needs this key; set it")


def _fedprox(config: FedConfig, sites: Collection[str], n_min: int) -> None:
    if config.training.local_steps == 1:
        raise ConfigError(
            "training.local_steps=1: fedprox pulls back from the second step of a round on; set it to 2 or more, or "
            "take the rule mean"
        )
    product = config.training.learning_rate * config.aggregation.proximal
    if product > 1:
        raise ConfigError(
            f"training.learning_rate * aggregation.proximal={product:g}: above 1 a step overshoots the start of the "
            "round, to which it is pulled back; lower one of the two"
        )


def _krum(config: FedConfig, sites: Collection[str], n_min: int) -> None:
    _at_least(config, n_min, 2 * config.aggregation.faulty + 3)


def _trimmed_mean(config: FedConfig, sites: Collection[str], n_min: int) -> None:
    _at_least(config, n_min, 2 * config.aggregation.faulty + 1)


def _at_least(config: FedConfig, n_min: int, needed: int) -> None:
    if n_min < needed:
        raise ConfigError(
            f"secagg.n_min={n_min}: {config.aggregation.rule} with "
            f"faulty={config.aggregation.faulty} needs {needed} updates in each round; raise n_min, or lower faulty"
        )


def _nested(config: FedConfig, sites: Collection[str], n_min: int) -> None:
    ranks, common = dict(config.aggregation.ranks_by_site()), config.adapter.rank
    for site, rank in ranks.items():
        if site not in sites:
            raise ConfigError(
                f"aggregation.ranks site={site!r}: no site of this federation; {nearest(site, list(sites))}"
            )
        if not 1 <= rank < common:
            raise ConfigError(f"aggregation.ranks rank={rank}: must be from 1 to below adapter.rank={common}")
    all_ranks = [ranks.get(site, common) for site in sites]
    for rank in sorted(set(all_ranks)):
        if (covering := sum(other >= rank for other in all_ranks)) < n_min:
            raise ConfigError(
                f"aggregation.ranks rank={rank}: only {covering} sites train so many columns, and a sum is opened over "
                f"secagg.n_min={n_min} or more; give fewer sites a smaller rank, or lower adapter.rank"
            )


def _olora(config: FedConfig, sites: Collection[str], n_min: int) -> None:
    for folder in config.aggregation.earlier:
        read_earlier(folder)


Check = Callable[[FedConfig, Collection[str], int], None]
CHECKS: dict[str, Check] = {
    "fedprox": _fedprox,
    "krum": _krum,
    "trimmed_mean": _trimmed_mean,
    "nested": _nested,
    "olora": _olora,
}
