"""The tables [aggregation] and [secagg] of the federation file: the server rule, and the coordinator's view."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

from offsite.errors import ConfigError
from offsite.privacy.ranges import HIGHEST, LOWEST
from offsite.trust.collusion import fewest_in_sum, usual_accomplices


@dataclass(frozen=True)
class RankConfig:
    """One entry [[aggregation.ranks]]: a smaller rank for some sites, for the rule `nested`.

    Attributes:
      sites: names of the sites; `secagg.n_min` sites have to train every column.
      rank: number of columns of each B that these sites train, counted from the first; at least 1.
    """

    sites: tuple[str, ...]
    rank: int


@dataclass(frozen=True)
class AggregationConfig:
    """The table [aggregation]: the server rule, and the numbers of the rule.

    Attributes:
      rule: name in `coordinator.aggregation.rules.AGGREGATORS`. Over the mean update: mean, fedavgm, fedadam,
        fedyogi; fedprox; rolora and olora for method `lora`; nested for `ffa_lora`. Over each site's update, with
        `secagg.enabled = false` only: krum, median, trimmed_mean, and flexlora for `lora`.
      learning_rate: step size of fedavgm, fedadam and fedyogi; from 1e-9 to 1e9.
      momentum: momentum of fedavgm, fedadam and fedyogi; from 0 to below 1.
      proximal: strength mu of fedprox, which pulls each step at a site back to the adapter at the start of the round,
        at no cost of privacy; from 1e-9 to 1e9 with fedprox, which needs `training.local_steps` above 1, else 0.
      faulty: number of sites that may send anything at all, for krum and trimmed_mean; 0 with all other rules.
      penalty: strength lambda of olora, from 1e-9 to 1e9; 0 with all other rules.
      earlier: folders of earlier adapters; olora keeps A out of their row spaces.
      ranks: entries of sites with a smaller rank than the adapter's, for nested.
    """

    rule: str = "fedadam"
    learning_rate: float = 0.01
    momentum: float = 0.9
    proximal: float = 0.0
    faulty: int = 0
    penalty: float = 0.0
    earlier: tuple[str, ...] = ()
    ranks: tuple[RankConfig, ...] = ()

    def ranks_by_site(self) -> tuple[tuple[str, int], ...]:
        """Returns (site, rank) of the sites with a smaller rank, sorted by site."""
        return tuple(sorted((site, entry.rank) for entry in self.ranks for site in entry.sites))

    def only(self, sites: Collection[str]) -> "AggregationConfig":
        """Returns the settings for some of the sites, without the ranks that belong to other sites alone."""
        kept = [dataclasses.replace(entry, sites=tuple(s for s in entry.sites if s in sites)) for entry in self.ranks]
        return dataclasses.replace(self, ranks=tuple(entry for entry in kept if entry.sites))


@dataclass(frozen=True)
class SecaggConfig:
    """The table [secagg]: secure aggregation.

    Attributes:
      n_min: smallest number of sites whose sum may be opened, or whose updates are used without secure aggregation; at
        least a third of all sites and two more, and at least 3. 0 takes the smallest allowed number; in a federation
        between organisations the number that the owners signed counts where it is larger.
      federation: name of a simulated federation that every signature covers.
      enabled: switch of secure aggregation; `false` lets the coordinator see each site's update, noise included, for
        rules that compare updates. Every owner has to permit this (`allow_individual_updates`), and job, log and report
        say so first.
    """

    n_min: int = 0
    federation: str = "simulation"
    enabled: bool = True

    def fewest(self, members: int) -> int:
        """Returns n_min of a simulation with so many sites."""
        return self.n_min or fewest_in_sum(usual_accomplices(members))


def check_aggregation(aggregation: AggregationConfig) -> None:
    """Checks the numbers and names that need no knowledge of the rule, the adapter and the sites.

    Raises:
      ConfigError: a number is out of its range, or a site is in two ranks.
    """
    if not LOWEST <= aggregation.learning_rate <= HIGHEST:
        raise ConfigError(
            f"aggregation.learning_rate={aggregation.learning_rate}: must be from {LOWEST:g} to {HIGHEST:g}",
            key="aggregation.learning_rate",
        )
    if not (0 <= aggregation.momentum < 1):
        raise ConfigError(
            f"aggregation.momentum={aggregation.momentum}: must lie in [0, 1); 0.9 is usual", key="aggregation.momentum"
        )
    for name in ("proximal", "penalty"):
        value = getattr(aggregation, name)
        if value != 0 and not LOWEST <= value <= HIGHEST:
            raise ConfigError(
                f"aggregation.{name}={value}: must be 0, or from {LOWEST:g} to {HIGHEST:g}", key=f"aggregation.{name}"
            )
    if aggregation.faulty < 0:
        raise ConfigError(f"aggregation.faulty={aggregation.faulty}: must be at least 0", key="aggregation.faulty")
    taken: set[str] = set()
    for place, entry in enumerate(aggregation.ranks):
        where = f"aggregation.ranks[{place}]"
        if not entry.sites:
            raise ConfigError(f"{where}.sites=[]: a rank is for one site or more; name sites, or remove the rank")
        for site in entry.sites:
            if site in taken:
                raise ConfigError(f"{where}.sites={site!r}: named before; a site has one rank, name the site once")
            taken.add(site)
