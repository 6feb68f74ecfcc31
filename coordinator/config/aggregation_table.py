"""The tables [aggregation] and [secagg] of the federation file: the server rule, and what the coordinator may see."""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass

from offsite.errors import ConfigError


@dataclass(frozen=True)
class RankConfig:
    """A smaller rank for some sites: they train the first `rank` columns of each B."""

    sites: tuple[str, ...]
    rank: int


@dataclass(frozen=True)
class AggregationConfig:
    """The server rule, a name in `coordinator.aggregate.AGGREGATORS`, and its numbers.

    Attributes:
      rule: the name.
      learning_rate: step size of fedavgm, fedadam and fedyogi.
      momentum: of those.
      proximal: mu of fedprox; 0 for all other rules.
      faulty: of krum and trimmed_mean: how many sites may send anything at all; 0 for all other rules.
      penalty: lambda of olora; 0 for all other rules.
      earlier: of olora: folders of earlier adapters.
      ranks: of nested: which sites have a smaller rank than the adapter's.
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
        return tuple(sorted((site, one.rank) for one in self.ranks for site in one.sites))

    def only(self, sites: Collection[str]) -> "AggregationConfig":
        """Returns the settings for some of the sites; a rank that none of them has is left out."""
        kept = [dataclasses.replace(one, sites=tuple(s for s in one.sites if s in sites)) for one in self.ranks]
        return dataclasses.replace(self, ranks=tuple(one for one in kept if one.sites))


@dataclass(frozen=True)
class SecaggConfig:
    """Secure aggregation.

    Attributes:
      n_min: smallest number of sites whose sum may be opened, or whose updates are used without secure aggregation.
      federation: the name in the transcript.
      enabled: False lets the coordinator see each site's update, for rules that compare them; every owner has to permit
        it, and every report says so first.
    """

    n_min: int = 3
    federation: str = "simulation"
    enabled: bool = True


def check_aggregation(aggregation: AggregationConfig) -> None:
    """Checks what can be checked without knowing the rule, the adapter and the sites.

    Raises:
      ConfigError: a number is out of its range, or a site is in two ranks.
    """
    if not (aggregation.learning_rate > 0 and math.isfinite(aggregation.learning_rate)):
        raise ConfigError(f"aggregation.learning_rate={aggregation.learning_rate}: must be finite and above 0")
    if not (0 <= aggregation.momentum < 1):
        raise ConfigError(f"aggregation.momentum={aggregation.momentum}: must lie in [0, 1); 0.9 is usual")
    for name in ("proximal", "penalty"):
        if not (0 <= getattr(aggregation, name) < math.inf):
            raise ConfigError(f"aggregation.{name}={getattr(aggregation, name)}: must be finite and at least 0")
    if aggregation.faulty < 0:
        raise ConfigError(f"aggregation.faulty={aggregation.faulty}: must be at least 0")
    taken: set[str] = set()
    for place, one in enumerate(aggregation.ranks):
        where = f"aggregation.ranks[{place}]"
        if not one.sites:
            raise ConfigError(f"{where}.sites=[]: a rank is for one site or more; name them, or remove it")
        for site in one.sites:
            if site in taken:
                raise ConfigError(f"{where}.sites={site!r}: named before; a site has one rank, name it once")
            taken.add(site)
